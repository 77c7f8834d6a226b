// The loops of cross_entropy, compiled once per instruction set by foreach_isa.h. The formulae
// stand in ../cross_entropy.h.
//
// Two walks over the same sums. Where a row's classes lie side by side, vectors lie along the
// classes (`row_*`). Where the positions behind the classes do, as in (N, C, H, W), a vector is as
// many rows, and goes from class to class (`column_*`). Any other strides are gathered into rows.
//
// Both go through blocks of classes that stay in the first-level cache: first the block's maximum,
// then its exponentials, and only when the maximum rises is what was summed scaled down. So every
// logit comes from memory once and is exponentiated once.

inline constexpr int64_t kRowBlock = 2048, kColumnBlock = 32;
inline constexpr int kWideColumns = 4;

template <class A>
inline constexpr A kInfinity = __builtin_huge_val();

// What the maximum is subtracted as: exp(-inf - -inf) must not be NaN while a row may yet hold
// something finite.
template <class A>
FASTNET_INLINE A shift_of(A maximum) {
  return maximum == -kInfinity<A> ? A(0) : maximum;
}
template <class A>
FASTNET_INLINE Vec<A> shift_of(Vec<A> maximum) {
  return maximum == splat(-kInfinity<A>) ? Vec<A>{} : maximum;
}

template <class A>
FASTNET_INLINE A exp_of(A x) {
  return exp(splat(x))[0];
}

// q at classes c, c + 1, ...: probabilities, smoothed, times the weights. Without probabilities
// the weights alone, which is what smoothing spreads.
template <class T>
FASTNET_INLINE Vec<acc_t<T>> target_at(const CrossEntropyCall<T>& call, const T* probabilities,
                                       const acc_t<T>* weight, int64_t c) {
  using A = acc_t<T>;
  Vec<A> q = splat(A(1));
  if (probabilities) q = load(probabilities + c) * call.keep + call.spread;
  return weight ? q * load(weight + c) : q;
}

// A row's sums, or kLanes rows' (A a vector then): Σ exp(x - shift), Σ q, Σ q (x - shift).
template <class A>
struct Sums {
  A maximum, exps, q, dot;
};

// The end of every row: its statistics and its loss. Adds what it counts in the mean to `divisor`.
template <class T>
FASTNET_INLINE acc_t<T> finish_row(const CrossEntropyCall<T>& call, int64_t row,
                                   const Sums<acc_t<T>>& sums, acc_t<T> log_sum, const T* logits,
                                   int64_t logits_cls, double& divisor) {
  using A = acc_t<T>;
  call.maximum[row] = sums.maximum;
  call.log_sum[row] = log_sum;
  const A smooth = sums.q * log_sum - sums.dot;
  if (call.needs_dot) call.target_sum[row] = sums.q;
  if (!call.classes) {
    divisor += 1;
    return smooth;
  }
  const int64_t y = call.classes[row];
  if (y == call.ignore_index) return 0;
  const A w = call.weight ? call.weight[y] : A(1);
  divisor += w;
  const A loss = w * ((sums.maximum - widen(logits[y * logits_cls])) + log_sum);
  return call.needs_dot ? call.keep * loss + call.spread * smooth : loss;
}

// A row's gradient is slope · softmax - offset · q, less `hit` at its class.
template <class A>
struct Slopes {
  A slope, offset, hit;
};

template <class T>
FASTNET_INLINE Slopes<acc_t<T>> slopes_of(const CrossEntropyCall<T>& call, int64_t row) {
  using A = acc_t<T>;
  const A scale = call.grad_loss[call.per_row ? row : 0] * call.grad_scale;
  if (!call.classes) return {scale * call.target_sum[row], scale, 0};
  const int64_t y = call.classes[row];
  if (y == call.ignore_index) return {0, 0, 0};
  const A hit = scale * call.keep * (call.weight ? call.weight[y] : A(1));
  const A offset = scale * call.spread;
  return {call.needs_dot ? hit + offset * call.target_sum[row] : hit, offset, hit};
}

// The logit at a row's class; 0 where it has none.
template <class T>
FASTNET_INLINE acc_t<T> logit_at_class(const CrossEntropyCall<T>& call, int64_t row,
                                       const T* logits, int64_t logits_cls) {
  if (!call.classes || call.classes[row] == call.ignore_index) return 0;
  return widen(logits[call.classes[row] * logits_cls]);
}

// Takes `hit` off the gradient at a row's class. Half types compute that element anew, from its
// logit x: what was stored is rounded, and 1 - p of a confident row would be lost.
template <class T>
FASTNET_INLINE void hit_class(const CrossEntropyCall<T>& call, int64_t row, acc_t<T> x, T* gradient,
                              int64_t gradient_cls, const Slopes<acc_t<T>>& slopes) {
  using A = acc_t<T>;
  if (!call.classes || call.classes[row] == call.ignore_index) return;
  const int64_t y = call.classes[row];
  T* const at = gradient + y * gradient_cls;
  A value = widen(*at);
  if constexpr (sizeof(T) != sizeof(A)) {
    value = slopes.slope * exp_of((x - call.maximum[row]) - call.log_sum[row]);
    if (call.needs_dot) value -= slopes.offset * (call.weight ? call.weight[y] : A(1));
  }
  narrow(value - slopes.hit, at);
}

// ---------------------------------------------------------------------------------------------
// Vectors along the classes

// `count` elements side by side: where they lie, or else copied into `buffer`, filled up to a
// vector with `pad`.
template <class T>
static const T* side_by_side(const T* from, int64_t stride, int64_t count, T pad, T* buffer) {
  if (stride == 1 && count >= kLanes<T>) return from;
  for (int64_t i = 0; i < count; ++i) buffer[i] = from[i * stride];
  for (int64_t i = count; i < kLanes<T>; ++i) buffer[i] = pad;
  return buffer;
}

template <class T>
FASTNET_INLINE T narrowed(acc_t<T> value) {
  T result;
  narrow(value, &result);
  return result;
}

// count >= kLanes, here and below; a last vector reaches back over elements already seen.
template <class T>
FASTNET_INLINE acc_t<T> block_maximum(const T* x, int64_t count) {
  using A = acc_t<T>;
  constexpr int kStep = kLanes<T>;
  Vec<A> most = load(x + count - kStep);
  int64_t c = 0;
  if (count >= 4 * kStep) {
    Vec<A> m[4] = {most, most, most, most};
    for (; c + 4 * kStep <= count; c += 4 * kStep) {
      for (int v = 0; v < 4; ++v) m[v] = maximum<A>(m[v], load(x + c + v * kStep));
    }
    most = maximum<A>(maximum<A>(m[0], m[1]), maximum<A>(m[2], m[3]));
  }
  for (; c + kStep <= count; c += kStep) most = maximum<A>(most, load(x + c));
  return reduce_max<A>(most);
}

// Σ exp(x - shift); with kStores the exponentials go to `out`, too, which is not x.
template <class T, bool kStores = false>
FASTNET_INLINE acc_t<T> block_exp_sum(const T* x, int64_t count, acc_t<T> shift, T* out = nullptr) {
  using A = acc_t<T>;
  constexpr int kStep = kLanes<T>;
  const auto add = [&](int64_t c, auto& exps, Vec<A>* sums) {
    constexpr int kCount = sizeof(exps) / sizeof(exps[0]);
    FASTNET_UNROLL for (int v = 0; v < kCount; ++v) {
      exps[v] = load(x + c + v * kStep) - splat(shift);
    }
    exp_each(exps);
    FASTNET_UNROLL for (int v = 0; v < kCount; ++v) {
      if constexpr (kStores) store(out + c + v * kStep, exps[v]);
      sums[v] += exps[v];
    }
  };
  Vec<A> sums[4] = {}, four[4], one[1];
  int64_t c = 0;
  for (; c + 4 * kStep <= count; c += 4 * kStep) {
    // The next block, or row: where a page ends the processor's own foresight does, too.
    __builtin_prefetch(x + count + c);
    __builtin_prefetch(x + count + c + 2 * kStep);
    add(c, four, sums);
  }
  for (; c + kStep <= count; c += kStep) add(c, one, sums);
  if (c < count) {
    Vec<A> last[1] = {};
    add(count - kStep, one, last);
    const auto is_new = lane_index<A>() >= splat(static_cast<A>(kStep - (count - c)));
    sums[1] += is_new ? last[0] : Vec<A>{};
  }
  return reduce_add<A>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// count >= kLanes; the last vector reaches back, but is scaled once.
template <class T>
FASTNET_INLINE void scale_block(T* x, int64_t count, acc_t<T> factor) {
  using A = acc_t<T>;
  constexpr int kStep = kLanes<T>;
  const Vec<A> by = splat(factor), last = load(x + count - kStep);
  for (int64_t c = 0; c + kStep <= count; c += kStep) store(x + c, load(x + c) * by);
  store(x + count - kStep, last * by);
}

// Adds a block's Σ q and Σ q (x - shift).
template <class T>
static void block_dot(const CrossEntropyCall<T>& call, const T* x, const T* probabilities,
                      const acc_t<T>* weight, int64_t count, Sums<acc_t<T>>& sums) {
  using A = acc_t<T>;
  constexpr int kStep = kLanes<T>;
  const A shift = shift_of(sums.maximum);
  Vec<A> q_sum = {}, dot = {};
  for (int64_t c = 0; c < count; c += kStep) {
    Vec<A> q = target_at(call, probabilities, weight, c < count - kStep ? c : count - kStep);
    Vec<A> term = q * (load(x + (c < count - kStep ? c : count - kStep)) - splat(shift));
    if (c > count - kStep) {
      const auto is_new = lane_index<A>() >= splat(static_cast<A>(kStep - (count - c)));
      q = is_new ? q : Vec<A>{};
      term = is_new ? term : Vec<A>{};
    }
    q_sum += q;
    dot += term;
  }
  sums.q += reduce_add<A>(q_sum);
  sums.dot += reduce_add<A>(dot);
}

// The same for a block narrower than a vector.
template <class T>
static void narrow_block_dot(const CrossEntropyCall<T>& call, const T* x, const T* probabilities,
                             const acc_t<T>* weight, int64_t count, Sums<acc_t<T>>& sums) {
  using A = acc_t<T>;
  for (int64_t c = 0; c < count; ++c) {
    A q = probabilities ? widen(probabilities[c]) * call.keep + call.spread : A(1);
    if (weight) q *= weight[c];
    sums.q += q;
    sums.dot += q * (widen(x[c]) - shift_of(sums.maximum));
  }
}

template <class T>
static Sums<acc_t<T>> row_sums(const CrossEntropyCall<T>& call, const T* logits,
                               const T* probabilities) {
  using A = acc_t<T>;
  T logits_buffer[kRowBlock], target_buffer[kRowBlock];
  Sums<A> sums{-kInfinity<A>, 0, 0, 0};
  for (int64_t first = 0; first < call.C; first += kRowBlock) {
    const int64_t count = call.C - first < kRowBlock ? call.C - first : kRowBlock;
    const int64_t padded = count < kLanes<T> ? kLanes<T> : count;
    const T* const x = side_by_side(logits + first * call.logits_at.cls, call.logits_at.cls, count,
                                    narrowed<T>(-kInfinity<A>), logits_buffer);
    const A most = block_maximum(x, padded);
    if (sums.maximum < most) {
      const A fall = shift_of(sums.maximum) - shift_of(most);
      if (sums.maximum != -kInfinity<A>) sums.exps *= exp_of(fall);
      if (first > 0) sums.dot += sums.q * fall;
      sums.maximum = most;
    }
    sums.exps += block_exp_sum(x, padded, shift_of(sums.maximum));
    if (!call.needs_dot) continue;
    const T* const t = probabilities
                           ? side_by_side(probabilities + first * call.target_at.cls,
                                          call.target_at.cls, count, narrowed<T>(0), target_buffer)
                           : nullptr;
    const A* const w = call.weight ? call.weight + first : nullptr;
    if (count < kLanes<T>) {
      narrow_block_dot(call, x, t, w, count, sums);
    } else {
      block_dot(call, x, t, w, count, sums);
    }
  }
  return sums;
}

template <class T, bool kOffset>
static void row_gradient(const CrossEntropyCall<T>& call, int64_t row, const T* logits,
                         const T* probabilities, T* gradient, const Slopes<acc_t<T>>& slopes) {
  using A = acc_t<T>;
  constexpr int kStep = kLanes<T>;
  T logits_buffer[kRowBlock], target_buffer[kRowBlock], gradient_buffer[kRowBlock];
  A weight_buffer[kStep];
  const Vec<A> most = splat(call.maximum[row]), log_sum = splat(call.log_sum[row]);
  const Vec<A> slope = splat(slopes.slope), offset = splat(slopes.offset);
  const A x_of_class = logit_at_class(call, row, logits, call.logits_at.cls);
  for (int64_t first = 0; first < call.C; first += kRowBlock) {
    const int64_t count = call.C - first < kRowBlock ? call.C - first : kRowBlock;
    const T* const x = side_by_side(logits + first * call.logits_at.cls, call.logits_at.cls, count,
                                    narrowed<T>(0), logits_buffer);
    const T* t = nullptr;
    const A* w = nullptr;
    if constexpr (kOffset) {
      if (probabilities) {
        t = side_by_side(probabilities + first * call.target_at.cls, call.target_at.cls, count,
                         narrowed<T>(0), target_buffer);
      }
      if (call.weight) w = call.weight + first;
      if (w && count < kStep) {
        for (int64_t c = 0; c < count; ++c) weight_buffer[c] = w[c];
        for (int64_t c = count; c < kStep; ++c) weight_buffer[c] = 0;
        w = weight_buffer;
      }
    }
    const bool in_place = call.gradient_at.cls == 1 && count >= kStep;
    T* const g = in_place ? gradient + first : gradient_buffer;
    const int64_t padded = count < kStep ? kStep : count;
    const auto differentiate = [&](int64_t c, auto& values) {
      constexpr int kCount = sizeof(values) / sizeof(values[0]);
      FASTNET_UNROLL for (int v = 0; v < kCount; ++v) values[v] = (values[v] - most) - log_sum;
      exp_each(values);
      FASTNET_UNROLL for (int v = 0; v < kCount; ++v) {
        values[v] *= slope;
        if constexpr (kOffset) values[v] -= offset * target_at(call, t, w, c + v * kStep);
        store(g + c + v * kStep, values[v]);
      }
    };
    // The last vector reaches back over what is written by then, maybe in the logits' own place.
    Vec<A> last[1] = {load(x + padded - kStep)}, one[1], four[4];
    int64_t c = 0;
    for (; c + 4 * kStep <= padded; c += 4 * kStep) {
      FASTNET_UNROLL for (int v = 0; v < 4; ++v) four[v] = load(x + c + v * kStep);
      differentiate(c, four);
    }
    for (; c + kStep <= padded; c += kStep) {
      one[0] = load(x + c);
      differentiate(c, one);
    }
    if (c < padded) differentiate(padded - kStep, last);
    if (!in_place) {
      for (int64_t c = 0; c < count; ++c) gradient[(first + c) * call.gradient_at.cls] = g[c];
    }
  }
  hit_class(call, row, x_of_class, gradient, call.gradient_at.cls, slopes);
}

// ---------------------------------------------------------------------------------------------
// Vectors along the positions behind the classes: kVectors of them. `Columns` says where position 0
// of class 0 lies, and how far it is to the next class.

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
    *reinterpret_cast<UnalignedVec<A>*>(maximum + v * kStep) = sums[v].maximum;
    *reinterpret_cast<UnalignedVec<A>*>(log_sum + v * kStep) = log(sums[v].exps);
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

// ---------------------------------------------------------------------------------------------
// The three ways through a chunk of rows

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

// begin and end lie within one n where the columns are the tensors' own.
template <class T>
void cross_entropy_forward_kernel(const CrossEntropyCall<T>& call, int64_t begin, int64_t end,
                                  ChunkSums& out) {
  using A = acc_t<T>;
  constexpr int64_t kStep = kLanes<T>, kWide = kWideColumns * kStep;
  const auto& at = call.logits_at;
  const auto& t_at = call.target_at;
  if (call.by_columns) {
    const int64_t n = begin / call.D, d = begin % call.D, width = end - begin;
    const T* const x = call.logits + n * at.outer + d;
    const T* const t = call.probabilities ? call.probabilities + n * t_at.outer + d : nullptr;
    const auto from = [](const T* columns, int64_t i) { return columns ? columns + i : nullptr; };
    int64_t i = 0;
    for (; i + kWide <= width; i += kWide) {
      column_forward<T, kWideColumns>(call, {x + i, at.cls}, {from(t, i), t_at.cls}, begin + i, 0,
                                      kWide, out);
    }
    for (; i < width; i += kStep) {  // the last one reaches back
      const int64_t j = i + kStep <= width ? i : width - kStep;
      column_forward<T, 1>(call, {x + j, at.cls}, {from(t, j), t_at.cls}, begin + j, i - j, kStep,
                           out);
    }
  } else if (has_few_classes(call, end - begin)) {
    Tile<T> x, t;
    RowWalk x_walk(at, call.D, begin), t_walk(t_at, call.D, begin);
    for_tiles<T>(begin, end, [&](auto vectors, int64_t row, int64_t count) {
      const Columns<T> targets = call.probabilities
                                     ? t.gather(call.probabilities, t_walk, call.C, count, vectors)
                                     : Columns<T>{nullptr, 0};
      column_forward<T, decltype(vectors)::value>(
          call, x.gather(call.logits, x_walk, call.C, count, vectors), targets, row, 0, count, out);
    });
  } else {
    RowWalk x_walk(at, call.D, begin), t_walk(t_at, call.D, begin);
    for (int64_t row = begin; row < end; ++row) {
      const T* const x = call.logits + x_walk.next();
      const T* const t = call.probabilities ? call.probabilities + t_walk.next() : nullptr;
      const Sums<A> sums = row_sums(call, x, t);
      const A log_sum = log(splat(sums.exps))[0];
      const A loss = finish_row(call, row, sums, log_sum, x, at.cls, out.divisor);
      if (call.losses) call.losses[row] = loss;
      out.loss += loss;
    }
  }
}

template <class T, bool kOffset>
static void backward_chunk(const CrossEntropyCall<T>& call, int64_t begin, int64_t end) {
  constexpr int64_t kStep = kLanes<T>, kWide = kWideColumns * kStep;
  const auto& at = call.logits_at;
  const auto& t_at = call.target_at;
  const auto& g_at = call.gradient_at;
  if (call.by_columns) {
    const int64_t n = begin / call.D, d = begin % call.D, width = end - begin;
    const T* const x = call.logits + n * at.outer + d;
    const T* const t = call.probabilities ? call.probabilities + n * t_at.outer + d : nullptr;
    T* const g = call.gradient + n * g_at.outer + d;
    const auto from = [](const T* columns, int64_t i) { return columns ? columns + i : nullptr; };
    int64_t i = 0;
    for (; i + kWide <= width; i += kWide) {
      column_gradient<T, kWideColumns, kOffset>(call, {x + i, at.cls}, {from(t, i), t_at.cls},
                                                g + i, g_at.cls, begin + i, kWide);
    }
    for (; i < width; i += kStep) {  // the last one reaches back, and makes those columns anew
      const int64_t j = i + kStep <= width ? i : width - kStep;
      column_gradient<T, 1, kOffset>(call, {x + j, at.cls}, {from(t, j), t_at.cls}, g + j, g_at.cls,
                                     begin + j, kStep);
    }
  } else if (has_few_classes(call, end - begin)) {
    Tile<T> x, t, g;
    RowWalk x_walk(at, call.D, begin), t_walk(t_at, call.D, begin), g_walk(g_at, call.D, begin);
    for_tiles<T>(begin, end, [&](auto vectors, int64_t row, int64_t count) {
      const Columns<T> targets = kOffset && call.probabilities
                                     ? t.gather(call.probabilities, t_walk, call.C, count, vectors)
                                     : Columns<T>{nullptr, 0};
      column_gradient<T, decltype(vectors)::value, kOffset>(
          call, x.gather(call.logits, x_walk, call.C, count, vectors), targets, g.elements, kWide,
          row, count);
      g.scatter(call.gradient, g_walk, call.C, count);
    });
  } else {
    RowWalk x_walk(at, call.D, begin), t_walk(t_at, call.D, begin), g_walk(g_at, call.D, begin);
    for (int64_t row = begin; row < end; ++row) {
      const T* const t = call.probabilities ? call.probabilities + t_walk.next() : nullptr;
      row_gradient<T, kOffset>(call, row, call.logits + x_walk.next(), t,
                               call.gradient + g_walk.next(), slopes_of(call, row));
    }
  }
}

template <class T>
void cross_entropy_backward_kernel(const CrossEntropyCall<T>& call, int64_t begin, int64_t end) {
  if (call.needs_dot) {
    backward_chunk<T, true>(call, begin, end);
  } else {
    backward_chunk<T, false>(call, begin, end);
  }
}

// ---------------------------------------------------------------------------------------------
// Loss and gradient at once

// So many blocks of a row keep what was subtracted from them.
inline constexpr int64_t kMostBlocks = 64;

// The size of a row's next block; what would be a last one narrower than a vector belongs to it.
template <class T>
FASTNET_INLINE int64_t next_block(int64_t rest) {
  return rest < kRowBlock + kLanes<T> ? rest : kRowBlock;
}

// A row of a class index without smoothing, whose classes lie side by side, here and in the
// gradient. That holds the exponentials until their sum is known.
template <class T>
static acc_t<T> row_with_gradient(const CrossEntropyCall<T>& call, int64_t row, const T* x,
                                  T* gradient, double& divisor) {
  using A = acc_t<T>;
  A shifts[kMostBlocks];
  A* shift = shifts;
  Sums<A> sums{-kInfinity<A>, 0, 0, 0};
  for (int64_t first = 0, count; first < call.C; first += count) {
    count = next_block<T>(call.C - first);
    const A most = block_maximum(x + first, count);
    if (sums.maximum < most) {
      if (sums.maximum != -kInfinity<A>) sums.exps *= exp_of(sums.maximum - most);
      sums.maximum = most;
    }
    *shift = shift_of(sums.maximum);
    sums.exps += block_exp_sum<T, true>(x + first, count, *shift++, gradient + first);
  }
  const A log_sum = log(splat(sums.exps))[0];
  const A loss = finish_row(call, row, sums, log_sum, x, 1, divisor);
  const Slopes<A> slopes = slopes_of(call, row);
  const A factor = slopes.slope / sums.exps;
  shift = shifts;
  for (int64_t first = 0, count; first < call.C; first += count) {
    count = next_block<T>(call.C - first);
    // Above 0 where a block was -inf throughout, and its exponentials are 0.
    const A fall = *shift++ - shift_of(sums.maximum);
    scale_block(gradient + first, count, fall < 0 ? factor * exp_of(fall) : factor);
  }
  hit_class(call, row, A(0), gradient, 1, slopes);
  return loss;
}

// The same of few classes, and `count` rows in a tile, which holds the exponentials. Returns the
// sum of their losses. Of what finish_row and slopes_of do for a row it has only what this case
// needs: at ten classes the loops over rows are a third of the work as it is.
template <class T, int kVectors>
static double tile_with_gradient(const CrossEntropyCall<T>& call, Tile<T>& tile, int64_t row,
                                 int64_t count, RowWalk& x_walk, RowWalk& g_walk) {
  using A = acc_t<T>;
  constexpr int kStep = kLanes<T>, kRows = Tile<T>::kRows;
  RowWalk x_first = x_walk;
  tile.gather(call.logits, x_walk, call.C, count, kVectors);

  Vec<A> most[kVectors], sums[kVectors], values[kVectors];
  FASTNET_UNROLL for (int v = 0; v < kVectors; ++v) {
    most[v] = splat(-kInfinity<A>);
    sums[v] = Vec<A>{};
  }
  for (int64_t c = 0; c < call.C; ++c) {
    const T* const x = tile.elements + c * kRows;
    FASTNET_UNROLL for (int v = 0; v < kVectors; ++v) {
      most[v] = maximum<A>(most[v], load(x + v * kStep));
    }
  }
  A maxima[kVectors * kStep], log_sums[kVectors * kStep], exp_sums[kVectors * kStep];
  A hits[kVectors * kStep];
  FASTNET_UNROLL for (int v = 0; v < kVectors; ++v) {
    store(maxima + v * kStep, most[v]);
    most[v] = shift_of<A>(most[v]);
  }
  for (int64_t c = 0; c < call.C; ++c) {
    T* const x = tile.elements + c * kRows;
    FASTNET_UNROLL for (int v = 0; v < kVectors; ++v) values[v] = load(x + v * kStep) - most[v];
    exp_each(values);
    FASTNET_UNROLL for (int v = 0; v < kVectors; ++v) {
      store(x + v * kStep, values[v]);
      sums[v] += values[v];
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    store(log_sums + v * kStep, log(sums[v]));
    store(exp_sums + v * kStep, sums[v]);
    store(hits + v * kStep, Vec<A>{});
  }

  const A scale = call.grad_loss[0] * call.grad_scale;
  double loss = 0;
  for (int64_t i = 0; i < count; ++i) {
    const T* const x = call.logits + x_first.next();
    const int64_t y = call.classes[row + i];
    if (y == call.ignore_index) continue;
    const A w = call.weight ? call.weight[y] : A(1);
    loss += w * ((maxima[i] - x[y * call.logits_at.cls]) + log_sums[i]);
    hits[i] = scale * w;
    tile.elements[y * kRows + i] -= exp_sums[i];  // softmax less 1, times the sum
  }
  FASTNET_UNROLL for (int v = 0; v < kVectors; ++v) sums[v] = load(hits + v * kStep) / sums[v];
  for (int64_t c = 0; c < call.C; ++c) {
    T* const x = tile.elements + c * kRows;
    FASTNET_UNROLL for (int v = 0; v < kVectors; ++v) {
      store(x + v * kStep, load(x + v * kStep) * sums[v]);
    }
  }
  tile.scatter(call.gradient, g_walk, call.C, count);
  return loss;
}

// Leaves the divisor to the caller, who has to know it before.
template <class T>
void cross_entropy_with_gradient_kernel(const CrossEntropyCall<T>& call, int64_t begin, int64_t end,
                                        ChunkSums& out) {
  // Half types would round the exponentials.
  const bool is_plain = sizeof(T) == sizeof(acc_t<T>) && !call.by_columns && !call.needs_dot;
  RowWalk x_walk(call.logits_at, call.D, begin), g_walk(call.gradient_at, call.D, begin);
  if constexpr (sizeof(T) == sizeof(acc_t<T>)) {
    if (is_plain && has_few_classes(call, end - begin)) {
      Tile<T> tile;
      for_tiles<T>(begin, end, [&](auto vectors, int64_t row, int64_t count) {
        out.loss +=
            tile_with_gradient<T, decltype(vectors)::value>(call, tile, row, count, x_walk, g_walk);
      });
      return;
    }
  }
  const bool by_rows = is_plain && call.logits_at.cls == 1 && call.gradient_at.cls == 1 &&
                       call.C <= kMostBlocks * kRowBlock;
  if (!by_rows) {  // what the one has read is near when the other comes
    cross_entropy_forward_kernel(call, begin, end, out);
    cross_entropy_backward_kernel(call, begin, end);
    return;
  }
  for (int64_t row = begin; row < end; ++row) {
    const T* const x = call.logits + x_walk.next();
    out.loss += row_with_gradient(call, row, x, call.gradient + g_walk.next(), out.divisor);
  }
}
