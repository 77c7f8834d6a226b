// The loops of cross_entropy with vectors along the positions behind the classes: kVectors of them.
// `Columns` says where position 0 of class 0 lies, and how far it is to the next class. No include
// guard, like the other files of kernels.

template <class T>
struct Columns {
  const T* first;
  int64_t cls;

  inline __attribute__((always_inline)) Vec<acc_t<T>> at(int64_t c, int v) const {
    return load(first + c * cls + v * kLanes<T>);
  }
};

// Rows row, row + 1, ...; those in [skip, count) are wanted, the other lanes only come along.
template <class T, int kVectors>
static void column_forward(const CrossEntropyCall<T>& call, Columns<T> x, Columns<T> t, int64_t row,
                           int64_t skip, int64_t count, ChunkSums& out) {
  using A = acc_t<T>;
  constexpr int kStep = kLanes<T>;
  Sums<Vec<A>> sums[kVectors];
  for (auto& s : sums) s = {splat(-kInfinity<A>), Vec<A>{}, Vec<A>{}, Vec<A>{}};
  for (int64_t first = 0; first < call.C; first += kColumnBlock) {
    const int64_t last = first + kColumnBlock < call.C ? first + kColumnBlock : call.C;
    Vec<A> shift[kVectors];
    for (int v = 0; v < kVectors; ++v) shift[v] = sums[v].maximum;
    for (int64_t c = first; c < last; ++c) {
      for (int v = 0; v < kVectors; ++v) {
        sums[v].maximum = maximum<A>(sums[v].maximum, x.at(c, v));
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      const Vec<A> before = shift[v];
      shift[v] = shift_of<A>(sums[v].maximum);
      if (first == 0) continue;
      const Vec<A> fall = shift_of<A>(before) - shift[v];
      sums[v].exps *= before == splat(-kInfinity<A>) ? splat(A(1)) : exp(fall);
      sums[v].dot += sums[v].q * fall;
    }
    for (int64_t c = first; c < last; ++c) {
      Vec<A> exps[kVectors];
      for (int v = 0; v < kVectors; ++v) exps[v] = x.at(c, v) - shift[v];
      exp_each(exps);
      for (int v = 0; v < kVectors; ++v) sums[v].exps += exps[v];
    }
    if (!call.needs_dot) continue;
    for (int64_t c = first; c < last; ++c) {
      const A w = call.weight ? call.weight[c] : A(1);
      for (int v = 0; v < kVectors; ++v) {
        Vec<A> q = splat(w);
        if (t.first) q *= t.at(c, v) * call.keep + call.spread;
        sums[v].q += q;
        sums[v].dot += q * (x.at(c, v) - shift[v]);
      }
    }
  }
  A maximum[kVectors * kStep], log_sum[kVectors * kStep];
  for (int v = 0; v < kVectors; ++v) {
    store(maximum + v * kStep, sums[v].maximum);
    store(log_sum + v * kStep, log(sums[v].exps));
  }
  double loss_sum = 0, divisor = 0;
  for (int64_t i = skip; i < count; ++i) {
    const Sums<Vec<A>>& s = sums[i / kStep];
    const int lane = static_cast<int>(i % kStep);
    const A loss = finish_row(call, row + i, {maximum[i], 0, s.q[lane], s.dot[lane]}, log_sum[i],
                              x.first + i, x.cls, divisor);
    if (call.losses) call.losses[row + i] = loss;
    loss_sum += loss;
  }
  out.loss += loss_sum;
  out.divisor += divisor;
}

// Rows row, row + 1, ..., row + count - 1.
template <class T, int kVectors, bool kOffset>
static void column_gradient(const CrossEntropyCall<T>& call, Columns<T> x, Columns<T> t, T* g,
                            int64_t g_cls, int64_t row, int64_t count) {
  using A = acc_t<T>;
  constexpr int kStep = kLanes<T>, kRows = kVectors * kStep;
  Slopes<A> slopes[kRows];
  A slope[kRows], offset[kRows], maximum[kRows], log_sum[kRows];
  for (int64_t i = count; i < kRows; ++i) slope[i] = offset[i] = maximum[i] = log_sum[i] = 0;
  for (int64_t i = 0; i < count; ++i) {
    slopes[i] = slopes_of(call, row + i);
    slope[i] = slopes[i].slope;
    offset[i] = slopes[i].offset;
    maximum[i] = call.maximum[row + i];
    log_sum[i] = call.log_sum[row + i];
  }
  for (int64_t c = 0; c < call.C; ++c) {
    const A w = call.weight ? call.weight[c] : A(1);
    Vec<A> p[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      p[v] = (x.at(c, v) - load(maximum + v * kStep)) - load(log_sum + v * kStep);
    }
    exp_each(p);
    for (int v = 0; v < kVectors; ++v) {
      Vec<A> value = load(slope + v * kStep) * p[v];
      if constexpr (kOffset) {
        Vec<A> q = splat(w);
        if (t.first) q *= t.at(c, v) * call.keep + call.spread;
        value -= load(offset + v * kStep) * q;
      }
      store(g + c * g_cls + v * kStep, value);
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    const A logit = logit_at_class(call, row + i, x.first + i, x.cls);
    hit_class(call, row + i, logit, g + i, g_cls, slopes[i]);
  }
}

// Goes through the first elements of rows, one after the other, without a division at each.
struct RowWalk {
  ClassStrides at;
  int64_t D, d, offset, turn;

  RowWalk(const ClassStrides& at, int64_t D, int64_t row)
      : at(at),
        D(D),
        d(row % D),
        offset(row / D * at.outer + d * at.inner),
        turn(at.outer - (D - 1) * at.inner) {}

  int64_t next() {
    const int64_t here = offset;
    const bool is_last = ++d == D;
    offset += is_last ? turn : at.inner;
    if (is_last) d = 0;
    return here;
  }
};

// Up to so many classes, rows are copied into columns, a few vectors of them at a time, whatever
// their strides: no sum goes across a vector then, and no class count leaves lanes empty. Of very
// few rows most lanes would be.
inline constexpr int64_t kFewClasses = 128, kFewestClasses = 32;

template <class T>
FASTNET_INLINE bool has_few_classes(const CrossEntropyCall<T>& call, int64_t rows) {
  return call.C <= kFewestClasses || (call.C <= kFewClasses && rows >= kLanes<T>);
}

template <class T>
struct Tile {
  static constexpr int kRows = kWideColumns * kLanes<T>;
  T elements[kFewClasses * kRows];

  // `count` rows, and zeros in as many vectors as for_tiles has for them.
  Columns<T> gather(const T* from, RowWalk& walk, int64_t C, int64_t count, int vectors) {
    if (is_matrix(walk)) {
      transpose(from + walk.offset, walk.turn, elements, kRows, count, C);
      walk.offset += count * walk.turn;
    } else {
      for (int64_t i = 0; i < count; ++i) {
        const T* const x = from + walk.next();
        for (int64_t c = 0; c < C; ++c) elements[c * kRows + i] = x[c * walk.at.cls];
      }
    }
    for (int64_t i = count; i < vectors * kLanes<T>; ++i) {
      for (int64_t c = 0; c < C; ++c) elements[c * kRows + i] = T{};
    }
    return {elements, kRows};
  }
  void scatter(T* to, RowWalk& walk, int64_t C, int64_t count) {
    if (is_matrix(walk)) {
      transpose(elements, kRows, to + walk.offset, walk.turn, C, count);
      walk.offset += count * walk.turn;
    } else {
      for (int64_t i = 0; i < count; ++i) {
        T* const g = to + walk.next();
        for (int64_t c = 0; c < C; ++c) g[c * walk.at.cls] = elements[c * kRows + i];
      }
    }
  }

 private:
  // Whether it is as far from each row to the next. Half types would be widened and rounded.
  static bool is_matrix(const RowWalk& walk) {
    return sizeof(T) == sizeof(acc_t<T>) && walk.at.cls == 1 &&
           (walk.D == 1 || walk.turn == walk.at.inner);
  }
};

// Goes through the rows a tile at a time: body(vectors, row, count), `vectors` a constant, as many
// as the rows fill.
template <class T, class Body>
FASTNET_INLINE void for_tiles(int64_t begin, int64_t end, const Body& body) {
  constexpr int64_t kStep = kLanes<T>;
  for (int64_t row = begin; row < end; row += kWideColumns * kStep) {
    const int64_t count = row + kWideColumns * kStep < end ? kWideColumns * kStep : end - row;
    if (count > 2 * kStep) {
      body(std::integral_constant<int, kWideColumns>{}, row, count);
    } else if (count > kStep) {
      body(std::integral_constant<int, 2>{}, row, count);
    } else {
      body(std::integral_constant<int, 1>{}, row, count);
    }
  }
}
