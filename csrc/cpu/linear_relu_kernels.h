// The loops of linear_relu, compiled once per instruction set by foreach_isa.h.
// M rows, K in_features, N out_features; every matrix is row-major and dense.

// ---------------------------------------------------------------------------------------------
// Products: c (I, K) = Σ_j a[i, j] · b (J, K)[j, :]
//
// Vectors lie along K; a's elements are broadcast. A tile of c is summed in registers.

inline constexpr int kProductRows = kRegisters == 32 ? 8 : 6;
inline constexpr int kProductVectors = kRegisters == 32 ? 3 : 2;
// Rows of b at a time: a tile's columns of so many stay in the first-level cache.
inline constexpr int64_t kProductDepth = kVectorBytes == 64 ? 128 : 256, kLowDepth = 64;
// Rows of a power of two share a few places of the cache, and long ones are on a page each: of rows
// of so many elements a tile's columns are copied side by side first, for so many rows of c.
inline constexpr int64_t kLongRow = 1024, kPackedFrom = 32;
// The same of factors, for so many columns, and so many rows of c at a time.
inline constexpr int64_t kManyColumns = 48, kBlockRows = 96;
// Up to so many steps are few.
inline constexpr int64_t kFewSteps = 32;

// A matrix's rows as they lie: `next` from one to the next.
template <class B>
struct Rows {
  const B* first;
  int64_t next;
};
// The factors of a product: those of row i and step j at first[i · row + j · step].
template <class A>
struct Factors {
  const A* first;
  int64_t row, step;
};

template <class A>
FASTNET_INLINE void copy(const A* from, int64_t count, A* to) {
  constexpr int kStep = kLanes<A>;
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) store(to + i, load(from + i));
  for (; i < count; ++i) to[i] = from[i];
}

// What a finished sum is stored as.
struct AsItIs {
  template <class V>
  V operator()(V sum, int) const {
    return sum;
  }
};

// One tile over j in [0, J). `add` goes on from the c of earlier j; the first `skip` columns, fewer
// than a vector's, which another tile has computed, stay as they are.
template <int kRows, int kVectors, class A, class B, class T, class Finish>
FASTNET_INLINE void product_tile(Factors<A> a, Rows<B> b, T* c, int64_t c_row, int64_t J, bool add,
                                 int64_t skip, const Finish& finish) {
  constexpr int kStep = kLanes<T>;
  Vec<A> sum[kRows][kVectors];
  FASTNET_UNROLL for (int r = 0; r < kRows; ++r) {
    FASTNET_UNROLL for (int v = 0; v < kVectors; ++v) sum[r][v] = Vec<A>{};
  }
  for (int64_t j = 0; j < J; ++j) {
    Vec<A> row[kVectors];
    for (int v = 0; v < kVectors; ++v) row[v] = load(b.first + j * b.next + v * kStep);
    for (int r = 0; r < kRows; ++r) {
      const Vec<A> factor = splat(a.first[r * a.row + j * a.step]);
      for (int v = 0; v < kVectors; ++v) sum[r][v] += factor * row[v];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      T* const to = c + r * c_row + v * kStep;
      Vec<A> value = sum[r][v];
      if (add) value += load(to);
      value = finish(value, v);
      if (v == 0 && skip) {
        value = lane_index<A>() >= splat(static_cast<A>(skip)) ? value : load(to);
      }
      store(to, value);
    }
  }
}

template <int kRows, int kVectors, class A, class B, class T, class Finish>
static void product_rows(Factors<A> a, Rows<B> b, T* c, int64_t c_row, int64_t J, int64_t i,
                         int64_t i_end, bool add, int64_t skip, const Finish& finish) {
  for (; i + kRows <= i_end; i += kRows) {
    product_tile<kRows, kVectors>(Factors<A>{a.first + i * a.row, a.row, a.step}, b, c + i * c_row,
                                  c_row, J, add, skip, finish);
  }
  if constexpr (kRows > 1) {
    // What is left is one tile of its own height: two smaller ones would wait for their additions.
    product_rows<kRows - 1, kVectors>(a, b, c, c_row, J, i, i_end, add, skip, finish);
  }
}

// Calls body(vectors, k, skip) for the panels of columns [k_begin, k_end), of about the same width:
// so many vectors, a constant, from column k on. The last one reaches back over `skip` columns that
// the one before did. There are as many columns as a vector has lanes, at least.
template <class T, class Body>
FASTNET_INLINE void for_panels(int64_t k_begin, int64_t k_end, const Body& body) {
  constexpr int kStep = kLanes<T>;
  const int64_t width = k_end - k_begin, vectors = (width + kStep - 1) / kStep;
  const int64_t fewest = (vectors + kProductVectors - 1) / kProductVectors;
  const int64_t panels = fewest == 1 && width % kStep ? 2 : fewest;
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t first = panel * vectors / panels;
    const int64_t count = (panel + 1) * vectors / panels - first;
    const int64_t planned = k_begin + first * kStep;
    const int64_t k = planned + count * kStep <= k_end ? planned : k_end - count * kStep;
    with_constant<kProductVectors>(count, [&](auto constant) { body(constant, k, planned - k); });
  }
}

// ---------------------------------------------------------------------------------------------
// Forward: out (M, N) = relu(x (M, K) · w (N, K)ᵀ + bias (N)), without kRelu the sums themselves
//
// Rows of x and w are both contiguous along K, so a tile of outputs is a set of dot products with
// vectors along K: no packing, and per step kRows + kCols loads feed kRows · kCols FMAs. For many
// rows it is the product above, of which w's columns are made rows first: then no sum goes across
// a vector, and what is read comes from the first-level cache.

inline constexpr int kForwardRows = kRegisters == 32 ? 6 : 3;
inline constexpr int kForwardCols = 4;

// Whether it is worth to make rows of w's columns: for so many rows, and two vectors of columns at
// least. Rows of some hundred inputs go well in the first-level cache, and their sums across a
// vector are few: those are as quick as dot products for fewer rows than other ones.
inline bool takes_panels(int64_t rows, int64_t K, int64_t columns) {
  constexpr bool kHasMany = kRegisters == 32;
  if (K == 0 || columns < 2 * kLanes<float>) return false;
  if (K > 512 && K < 900) return kHasMany && rows >= 96;
  return rows >= (kHasMany ? 32 : 64);
}

// A NaN is not below zero, and stays.
template <class Z>
FASTNET_INLINE Z relu(Z z) {
  return z < Z{} ? Z{} : z;
}

template <bool kRelu, class Z>
FASTNET_INLINE Z activate(Z z) {
  if constexpr (kRelu) return relu(z);
  return z;
}

template <bool kRelu>
struct BiasAndRelu {
  const float* bias;  // or null
  Vec<float> operator()(Vec<float> sum, int v) const {
    if (bias) sum += load(bias + v * kLanes<float>);
    return activate<kRelu>(sum);
  }
};

// For K >= kLanes<T>.
template <class T, bool kRelu, int kRows, int kCols>
FASTNET_INLINE void forward_tile(const T* x, const T* w, const T* bias, T* out, int64_t K,
                                 int64_t N) {
  using A = acc_t<T>;
  constexpr int kStep = kLanes<T>;
  Vec<A> sum[kRows][kCols];
  FASTNET_UNROLL for (int r = 0; r < kRows; ++r) {
    FASTNET_UNROLL for (int c = 0; c < kCols; ++c) sum[r][c] = Vec<A>{};
  }
  int64_t k = 0;
  for (; k + kStep <= K; k += kStep) {
    Vec<A> a[kRows];
    for (int r = 0; r < kRows; ++r) a[r] = load(x + r * K + k);
    for (int c = 0; c < kCols; ++c) {
      const Vec<A> b = load(w + c * K + k);
      for (int r = 0; r < kRows; ++r) sum[r][c] += a[r] * b;
    }
  }
  if (k < K) {
    // The last vector reaches back over elements already summed; those lanes are blanked in both
    // factors, since a zero in one alone would turn an infinity in the other into a NaN.
    const auto is_new = lane_index<A>() >= splat(static_cast<A>(kStep - (K - k)));
    const Vec<A> zero = {};
    Vec<A> a[kRows];
    for (int r = 0; r < kRows; ++r) a[r] = is_new ? load(x + r * K + K - kStep) : zero;
    for (int c = 0; c < kCols; ++c) {
      const Vec<A> b = is_new ? load(w + c * K + K - kStep) : zero;
      for (int r = 0; r < kRows; ++r) sum[r][c] += a[r] * b;
    }
  }
  for (int r = 0; r < kRows; ++r) {
    if constexpr (kCols == 4) {
      Vec4<A> z = reduce_add_4<A>(sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
      if (bias) z += load_4(bias);
      store_4(out + r * N, activate<kRelu>(z));
    } else {
      for (int c = 0; c < kCols; ++c) {
        const A z = reduce_add<A>(sum[r][c]) + (bias ? widen(bias[c]) : A(0));
        narrow(activate<kRelu>(z), out + r * N + c);
      }
    }
  }
}

template <class T, bool kRelu, int kRows, int kCols>
static void forward_cols(const T* x, const T* w, const T* bias, T* out, int64_t K, int64_t N,
                         int64_t n_begin, int64_t n_end) {
  int64_t n = n_begin;
  for (; n + kCols <= n_end; n += kCols) {
    forward_tile<T, kRelu, kRows, kCols>(x, w + n * K, bias ? bias + n : nullptr, out + n, K, N);
  }
  if constexpr (kCols > 1) {
    forward_cols<T, kRelu, kRows, kCols / 2>(x, w, bias, out, K, N, n, n_end);
  }
}

template <class T, bool kRelu, int kRows>
static void forward_rows(const T* x, const T* w, const T* bias, T* out, int64_t K, int64_t N,
                         int64_t m_begin, int64_t m_end, int64_t n_begin, int64_t n_end) {
  int64_t m = m_begin;
  for (; m + kRows <= m_end; m += kRows) {
    forward_cols<T, kRelu, kRows, kForwardCols>(x + m * K, w, bias, out + m * N, K, N, n_begin,
                                                n_end);
  }
  if constexpr (kRows > 1) {
    forward_rows<T, kRelu, kRows - 1>(x, w, bias, out, K, N, m, m_end, n_begin, n_end);
  }
}

// For K < kLanes<T>: vectors lie along N, for `count` outputs of every row from n on, a vector of
// them at most.
template <class T, bool kRelu>
static void few_features(const T* x, const T* w, const T* bias, T* out, int64_t K, int64_t N,
                         int64_t m_begin, int64_t m_end, int64_t n, int64_t count) {
  using A = acc_t<T>;
  constexpr int kStep = kLanes<T>, kRows = 4;
  A columns[kStep][kStep] = {}, biases[kStep] = {};
  for (int64_t i = 0; i < count; ++i) {
    if (bias) biases[i] = widen(bias[n + i]);
    for (int64_t k = 0; k < K; ++k) columns[k][i] = widen(w[(n + i) * K + k]);
  }
  const auto rows = [&](int64_t m, auto& sums) {
    constexpr int kCount = sizeof(sums) / sizeof(sums[0]);
    FASTNET_UNROLL for (int r = 0; r < kCount; ++r) sums[r] = load(biases);
    for (int64_t k = 0; k < K; ++k) {
      const Vec<A> column = load(columns[k]);
      FASTNET_UNROLL for (int r = 0; r < kCount; ++r) {
        sums[r] += splat(static_cast<A>(widen(x[(m + r) * K + k]))) * column;
      }
    }
    for (int r = 0; r < kCount; ++r) {
      T* const to = out + (m + r) * N + n;
      const Vec<A> z = activate<kRelu>(sums[r]);
      if (count == kStep) {
        store(to, z);
      } else {
        for (int64_t i = 0; i < count; ++i) narrow(z[i], to + i);
      }
    }
  };
  Vec<A> several[kRows], one[1];
  int64_t m = m_begin;
  for (; m + kRows <= m_end; m += kRows) rows(m, several);
  for (; m < m_end; ++m) rows(m, one);
}

// How many rows fit into so many bytes: a multiple of a tile's, and one tile's at least.
FASTNET_INLINE int64_t rows_within(int64_t bytes, int64_t row_bytes, int64_t tile) {
  const int64_t tiles = bytes / row_bytes / tile;
  return tiles > 0 ? tiles * tile : tile;
}

// out[m, n] for m in [m_begin, m_end), n in [n_begin, n_end), a vector of them at least, as the
// product x · wᵀ. A block of x stays in the second-level cache while all outputs
// go past it, some of them and some inputs at a time.
template <bool kRelu>
void forward_by_panels_kernel(const float* x, const float* w, const float* bias, float* out,
                              int64_t K, int64_t N, int64_t m_begin, int64_t m_end, int64_t n_begin,
                              int64_t n_end) {
  constexpr int kStep = kLanes<float>;
  constexpr int64_t kRows = 256, kInputs = 1024;
  alignas(64) float panel[kProductDepth * kProductVectors * kStep];
  for (int64_t k_first = 0; k_first < K; k_first += kInputs) {
    const int64_t k_last = least(K, k_first + kInputs);
    for (int64_t m = m_begin; m < m_end; m += kRows) {
      const int64_t rows = least(m_end - m, kRows);
      for_panels<float>(n_begin, n_end, [&](auto vectors, int64_t n, int64_t skip) {
        constexpr int kVectors = decltype(vectors)::value, kWidth = kVectors * kStep;
        for (int64_t k = k_first; k < k_last; k += kProductDepth) {
          const int64_t steps = least(k_last - k, kProductDepth);
          transpose(w + n * K + k, K, panel, kWidth, kWidth, steps);
          const auto multiply = [&](const auto& finish) {
            product_rows<kProductRows, kVectors>(Factors<float>{x + m * K + k, K, 1},
                                                 Rows<float>{panel, kWidth}, out + m * N + n, N,
                                                 steps, 0, rows, k > 0, skip, finish);
          };
          k + steps < K ? multiply(AsItIs{})
                        : multiply(BiasAndRelu<kRelu>{bias ? bias + n : nullptr});
        }
      });
    }
  }
}

// out[m, n] for m in [m_begin, m_end), n in [n_begin, n_end)
template <class T, bool kRelu = true>
void forward_kernel(const T* x, const T* w, const T* bias, T* out, int64_t K, int64_t N,
                    int64_t m_begin, int64_t m_end, int64_t n_begin, int64_t n_end) {
  if (K < kLanes<T>) {
    for (int64_t n = n_begin; n < n_end; n += kLanes<T>) {
      const int64_t count = n_end - n < kLanes<T> ? n_end - n : kLanes<T>;
      few_features<T, kRelu>(x, w, bias, out, K, N, m_begin, m_end, n, count);
    }
    return;
  }
  if constexpr (std::is_same_v<T, float>) {
    if (takes_panels(m_end - m_begin, K, n_end - n_begin)) {
      forward_by_panels_kernel<kRelu>(x, w, bias, out, K, N, m_begin, m_end, n_begin, n_end);
      return;
    }
  }
  // As many rows of x at a time as stay in the second-level cache, and as many of w as stay in the
  // first-level one while those of x stream past them.
  const int64_t row_bytes = K * static_cast<int64_t>(sizeof(T));
  const int64_t height = rows_within(192 * 1024, row_bytes, kForwardRows);
  const int64_t width = rows_within(20 * 1024, row_bytes, kForwardCols);
  for (int64_t m = m_begin; m < m_end; m += height) {
    const int64_t m_stop = m + height < m_end ? m + height : m_end;
    for (int64_t n = n_begin; n < n_end; n += width) {
      const int64_t n_stop = n + width < n_end ? n + width : n_end;
      forward_rows<T, kRelu, kForwardRows>(x, w, bias, out, K, N, m, m_stop, n, n_stop);
    }
  }
}

// ---------------------------------------------------------------------------------------------
// The epilogue by itself, for a product that a library computed: out = relu(out + bias), in place

template <class T, bool kRelu>
void bias_relu_kernel(T* out, const T* bias, int64_t rows, int64_t N) {
  using A = acc_t<T>;
  constexpr int kStep = kLanes<T>;
  for (int64_t m = 0; m < rows; ++m) {
    T* row = out + m * N;
    int64_t n = 0;
    for (; n + kStep <= N; n += kStep) {
      Vec<A> z = load(row + n);
      if (bias) z += load(bias + n);
      store(row + n, activate<kRelu>(z));
    }
    for (; n < N; ++n) {
      const A z = widen(row[n]) + (bias ? widen(bias[n]) : A(0));
      narrow(activate<kRelu>(z), row + n);
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Backward, first step: of `columns` columns of matrices of N, grad_z = grad_out where out > 0,
// with z_row from one row to the next, and the sums of its columns, in one pass. As in torch, a NaN
// in out lets the gradient through. Z is the type that the gradient is wanted in: T for a library's
// product, acc_t<T> for the product below. Without kRelu there is no out, and nothing is masked;
// either result may be null.

// What is made of it, and out of what.
template <bool kRelu_, bool kHasZ_, bool kHasSums_>
struct MaskedGrad {
  static constexpr bool kRelu = kRelu_, kHasZ = kHasZ_, kHasSums = kHasSums_;
};

// Some vectors of columns, whose sums stay in registers. kIsLast reaches back, over `skip` columns
// that are done already.
template <class Made, int kVectors, bool kIsLast, class T, class Z>
static void masked_strip(const T* grad_out, const T* out, Z* grad_z, acc_t<T>* column_sums,
                         int64_t rows, int64_t N, int64_t z_row, int64_t skip) {
  using A = acc_t<T>;
  constexpr int kStep = kLanes<T>;
  Vec<A> sums[kVectors];
  FASTNET_UNROLL for (int v = 0; v < kVectors; ++v) sums[v] = Vec<A>{};
  for (int64_t m = 0; m < rows; ++m) {
    FASTNET_UNROLL for (int v = 0; v < kVectors; ++v) {
      const int64_t at = m * N + v * kStep;
      const Vec<A> grad = load(grad_out + at);
      Vec<A> masked = grad;
      if constexpr (Made::kRelu) masked = load(out + at) <= Vec<A>{} ? Vec<A>{} : grad;
      if constexpr (Made::kHasZ) store(grad_z + m * z_row + v * kStep, masked);
      if constexpr (Made::kHasSums) sums[v] += masked;
    }
  }
  const auto is_new = lane_index<A>() >= splat(static_cast<A>(skip));
  FASTNET_UNROLL for (int v = 0; Made::kHasSums && v < kVectors; ++v) {
    A* const to = column_sums + v * kStep;
    store(to, kIsLast ? (is_new ? sums[v] : load(to)) : sums[v]);
  }
}

// The same of rows shorter than a vector, which are gone through as one: after as many vectors as a
// row has elements, lanes have the same columns again.
template <class Made, class T, class Z>
static void masked_short_rows(const T* grad_out, const T* out, Z* grad_z, acc_t<T>* column_sums,
                              int64_t rows, int64_t N) {
  using A = acc_t<T>;
  constexpr int kStep = kLanes<T>;
  alignas(64) A sums[kStep * kStep] = {};
  int64_t at = 0, lane = 0;
  for (; at + kStep <= rows * N; at += kStep) {
    Vec<A> masked = load(grad_out + at);
    if constexpr (Made::kRelu) masked = load(out + at) <= Vec<A>{} ? Vec<A>{} : masked;
    if constexpr (Made::kHasZ) store(grad_z + at, masked);
    if constexpr (Made::kHasSums) {
      store(sums + lane, load(sums + lane) + masked);
      lane = lane + kStep < N * kStep ? lane + kStep : 0;
    }
  }
  for (; at < rows * N; ++at, ++lane) {
    A masked = widen(grad_out[at]);
    if constexpr (Made::kRelu) masked = widen(out[at]) <= 0 ? A(0) : masked;
    if constexpr (Made::kHasZ) narrow(masked, grad_z + at);
    if constexpr (Made::kHasSums) sums[lane] += masked;
  }
  for (int64_t n = 0; Made::kHasSums && n < N; ++n) {
    column_sums[n] = 0;
    for (int64_t i = n; i < N * kStep; i += N) column_sums[n] += sums[i];
  }
}

template <class Made, class T, class Z>
static void masked_columns(const T* grad_out, const T* out, Z* grad_z, acc_t<T>* column_sums,
                           int64_t rows, int64_t columns, int64_t N, int64_t z_row) {
  using A = acc_t<T>;
  constexpr int kStep = kLanes<T>, kStrip = kRegisters / 2;
  if (N < kStep && columns == N && z_row == N) {
    masked_short_rows<Made>(grad_out, out, grad_z, column_sums, rows, N);
    return;
  }
  int64_t n = 0;
  const auto strip = [&](auto vectors, auto is_last, int64_t skip) {
    masked_strip<Made, decltype(vectors)::value, decltype(is_last)::value>(
        grad_out + n, Made::kRelu ? out + n : nullptr, Made::kHasZ ? grad_z + n : nullptr,
        Made::kHasSums ? column_sums + n : nullptr, rows, N, z_row, skip);
  };
  const auto strips = [&](auto vectors) {
    constexpr int kWidth = decltype(vectors)::value * kStep;
    for (; n + kWidth <= columns; n += kWidth) strip(vectors, std::false_type{}, 0);
  };
  strips(std::integral_constant<int, kStrip>{});
  strips(std::integral_constant<int, kStrip / 4>{});
  strips(std::integral_constant<int, 1>{});
  if (n < columns && columns >= kStep) {
    const int64_t skip = n + kStep - columns;
    n = columns - kStep;
    strip(std::integral_constant<int, 1>{}, std::true_type{}, skip);
    return;
  }
  for (; n < columns; ++n) {
    A sum = 0;
    for (int64_t m = 0; m < rows; ++m) {
      A masked = widen(grad_out[m * N + n]);
      if constexpr (Made::kRelu) masked = widen(out[m * N + n]) <= 0 ? A(0) : masked;
      if constexpr (Made::kHasZ) narrow(masked, grad_z + m * z_row + n);
      sum += masked;
    }
    if constexpr (Made::kHasSums) column_sums[n] = sum;
  }
}

template <bool kRelu, class T, class Z>
void masked_grad_kernel(const T* grad_out, const T* out, Z* grad_z, acc_t<T>* column_sums,
                        int64_t rows, int64_t columns, int64_t N, int64_t z_row) {
  const auto make = !column_sums ? masked_columns<MaskedGrad<kRelu, true, false>, T, Z>
                    : !grad_z    ? masked_columns<MaskedGrad<kRelu, false, true>, T, Z>
                                 : masked_columns<MaskedGrad<kRelu, true, true>, T, Z>;
  make(grad_out, out, grad_z, column_sums, rows, columns, N, z_row);
}

// How many elements of it are not zero, in rows of N, `next` from one to the next.
inline int64_t not_zero_kernel(const float* grad_out, const float* out, int64_t rows, int64_t N,
                               int64_t next) {
  constexpr int kStep = kLanes<float>;
  const Vec<float> zero = {};
  Vec<int32_t> counts = {};  // as negative numbers
  int64_t count = 0;
  for (int64_t m = 0; m < rows; ++m, grad_out += next, out += next) {
    int64_t n = 0;
    for (; n + kStep <= N; n += kStep) {
      counts += (load(grad_out + n) != zero) & ~(load(out + n) <= zero);
    }
    for (; n < N; ++n) count += grad_out[n] != 0 && !(out[n] <= 0);
  }
  for (int lane = 0; lane < kStep; ++lane) count -= counts[lane];
  return count;
}

// ---------------------------------------------------------------------------------------------
// Backward, second step: the product above, which serves both gradients:
//   grad_weight (N, K) = grad_zᵀ · x    i = n, j = m, a[i, j] = grad_z[j, i]
//   grad_input  (M, K) = grad_z · w     i = m, j = n, a[i, j] = grad_z[i, j]

// c (I, K) for K < kLanes<T>: one vector to a row, of whose lanes some are empty. In it rows of b
// are copied, some at a time.
template <class T>
static void narrow_product(const T* a, int64_t a_row, int64_t a_step, const T* b, T* c, int64_t J,
                           int64_t K, int64_t i_begin, int64_t i_end, bool is_more) {
  constexpr int kStep = kLanes<T>, kDepth = 64, kRows = 4;
  T wide[kDepth][kStep] = {}, result[kStep] = {};
  int64_t first = 0;
  do {
    const int64_t steps = J - first < kDepth ? J - first : kDepth;
    for (int64_t j = 0; j < steps; ++j) {
      for (int64_t k = 0; k < K; ++k) wide[j][k] = b[(first + j) * K + k];
    }
    const T* const factors = a + first * a_step;
    const bool adds = is_more || first > 0;
    const auto rows = [&](int64_t i, auto& sums) {
      constexpr int kCount = sizeof(sums) / sizeof(sums[0]);
      FASTNET_UNROLL for (int r = 0; r < kCount; ++r) sums[r] = Vec<T>{};
      for (int64_t j = 0; j < steps; ++j) {
        const Vec<T> row = load(wide[j]);
        FASTNET_UNROLL for (int r = 0; r < kCount; ++r) {
          sums[r] += splat(factors[(i + r) * a_row + j * a_step]) * row;
        }
      }
      for (int r = 0; r < kCount; ++r) {
        T* const to = c + (i + r) * K;
        store(result, sums[r]);
        for (int64_t k = 0; k < K; ++k) to[k] = adds ? to[k] + result[k] : result[k];
      }
    };
    Vec<T> several[kRows], one[1];
    int64_t i = i_begin;
    for (; i + kRows <= i_end; i += kRows) rows(i, several);
    for (; i < i_end; ++i) rows(i, one);
    first += steps;
  } while (first < J);
}

// c[i, k] for i in [i_begin, i_end), k in [k_begin, k_end); with `is_more`, added to what is there.
// Of a c that `is_low`, of few rows, fewer of b are gone through at a time, which are then read one
// beside the other: to be told by the caller, as sums depend on it, who may want only some of the
// rows. A range of k is either as wide as a vector at least, or all of K.
template <class T>
void product_kernel(const acc_t<T>* a, int64_t a_row, int64_t a_step, const T* b, T* c, int64_t J,
                    int64_t K, int64_t i_begin, int64_t i_end, int64_t k_begin, int64_t k_end,
                    bool is_more = false, bool is_low = false) {
  using A = acc_t<T>;
  constexpr int kStep = kLanes<T>;
  if (k_end - k_begin < kStep) {
    if constexpr (std::is_same_v<T, A>) {
      narrow_product(a, a_row, a_step, b, c, J, K, i_begin, i_end, is_more);
      return;
    }
    for (int64_t i = i_begin; i < i_end; ++i) {
      for (int64_t k = k_begin; k < k_end; ++k) {
        A sum = is_more ? widen(c[i * K + k]) : A(0);
        for (int64_t j = 0; j < J; ++j) sum += a[i * a_row + j * a_step] * widen(b[j * K + k]);
        narrow(sum, c + i * K + k);
      }
    }
    return;
  }
  // Sums of half types must not pass through memory, and go in one.
  constexpr bool kMayPass = std::is_same_v<T, A>;
  [[maybe_unused]] alignas(64) A panel[kMayPass ? kProductDepth * kProductVectors * kStep : 1];
  [[maybe_unused]] alignas(64) A block[kMayPass ? kProductDepth * kBlockRows : 1];
  const bool in_blocks =
      kMayPass && a_row == 1 && a_step >= kLongRow && k_end - k_begin >= kManyColumns;
  // A product of few steps is bound by what it writes, which goes best in order.
  const int64_t height = J <= kFewSteps ? 3 * kProductRows
                         : in_blocks    ? kBlockRows
                                        : i_end - i_begin;
  for (int64_t i = i_begin; i < i_end; i += height) {
    const int64_t rows = least(i_end - i, height);
    const int64_t depth = !kMayPass ? (J > 0 ? J : 1) : is_low ? kLowDepth : kProductDepth;
    int64_t j = 0;
    do {
      const int64_t steps = least(J - j, depth);
      Factors<A> factors{a + i * a_row + j * a_step, a_row, a_step};
      if (in_blocks) {
        for (int64_t step = 0; step < steps; ++step) {
          copy(factors.first + step * a_step, rows, block + step * kBlockRows);
        }
        factors = {block, 1, kBlockRows};
      }
      const bool add = is_more || j > 0;
      for_panels<T>(k_begin, k_end, [&](auto vectors, int64_t k, int64_t skip) {
        constexpr int kVectors = decltype(vectors)::value, kWidth = kVectors * kStep;
        Rows<T> rows_of_b{b + j * K + k, K};
        if constexpr (kMayPass) {
          if (rows >= kPackedFrom && K >= kLongRow) {
            for (int64_t row = 0; row < steps; ++row) {
              copy(rows_of_b.first + row * K, kWidth, panel + row * kWidth);
            }
            rows_of_b = {panel, kWidth};
          }
        }
        product_rows<kProductRows, kVectors>(factors, rows_of_b, c + i * K + k, K, steps, 0, rows,
                                             add, skip, AsItIs{});
      });
      j += steps;
    } while (j < J);
  }
}

#include "linear_relu_sparse_kernels.h"
