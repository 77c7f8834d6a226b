// The loops of linear_relu, compiled once per instruction set by foreach_isa.h.
// M rows, K in_features, N out_features; every matrix is row-major and dense.

// ---------------------------------------------------------------------------------------------
// Forward: out (M, N) = relu(x (M, K) · w (N, K)ᵀ + bias (N)), without kRelu the sums themselves
//
// Rows of x and w are both contiguous along K, so a tile of outputs is a set of dot products with
// vectors along K: no packing, and per step kRows + kCols loads feed kRows · kCols FMAs.

inline constexpr int kForwardRows = kRegisters == 32 ? 6 : 3;
inline constexpr int kForwardCols = 4;

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
// Backward, first step: of `columns` columns of matrices of N, grad_z = grad_out where out > 0, and
// the sums of its columns, in one pass. As in torch, a NaN in out lets the gradient through. Z is
// the type that the gradient is wanted in: T for a library's product, acc_t<T> for the product
// below. Without kRelu there is no out, and nothing is masked; either result may be null. Returns
// how many elements of grad_z are not zero.

template <bool kRelu, class T, class Z>
int64_t masked_grad_kernel(const T* grad_out, const T* out, Z* grad_z, acc_t<T>* column_sums,
                           int64_t rows, int64_t columns, int64_t N) {
  using A = acc_t<T>;
  constexpr int kStep = kLanes<T>;
  const Vec<A> zero = {};
  decltype(zero == zero) not_zero = {};  // less their number, in each lane
  int64_t count = 0;
  for (int64_t n = 0; column_sums && n < columns; ++n) column_sums[n] = 0;
  const auto masked_rows = [&](auto has_z, auto has_sums) {
    for (int64_t m = 0; m < rows; ++m) {
      int64_t n = 0;
      for (; n + kStep <= columns; n += kStep) {
        const Vec<A> grad = load(grad_out + m * N + n);
        Vec<A> masked = grad;
        if constexpr (kRelu) masked = load(out + m * N + n) <= zero ? zero : grad;
        if constexpr (has_z.value) {
          store(grad_z + m * N + n, masked);
          not_zero += masked != zero;
        }
        if constexpr (has_sums.value) store(column_sums + n, load(column_sums + n) + masked);
      }
      for (; n < columns; ++n) {
        A masked = widen(grad_out[m * N + n]);
        if constexpr (kRelu) masked = widen(out[m * N + n]) <= 0 ? A(0) : masked;
        if constexpr (has_z.value) {
          narrow(masked, grad_z + m * N + n);
          count += masked != 0;
        }
        if constexpr (has_sums.value) column_sums[n] += masked;
      }
    }
  };
  if (!column_sums) {
    masked_rows(std::true_type{}, std::false_type{});
  } else if (!grad_z) {
    masked_rows(std::false_type{}, std::true_type{});
  } else {
    masked_rows(std::true_type{}, std::true_type{});
  }
  for (int lane = 0; lane < kStep; ++lane) count -= not_zero[lane];
  return count;
}

// ---------------------------------------------------------------------------------------------
// Backward, second step: c (I, K) = Σ_j a[i, j] · b (J, K)[j, :], which serves both gradients:
//   grad_weight (N, K) = grad_zᵀ · x    i = n, j = m, a[i, j] = grad_z[j, i]
//   grad_input  (M, K) = grad_z · w     i = m, j = n, a[i, j] = grad_z[i, j]
// Vectors lie along K; a's elements are broadcast.

inline constexpr int kProductRows = kRegisters == 32 ? 8 : 6;
inline constexpr int kProductVectors = kRegisters == 32 ? 3 : 2;

// One tile over j in [0, J). `add` goes on from the c of earlier j; the first `skip` columns, which
// another tile has computed, stay as they are.
template <class T, int kRows, int kVectors>
FASTNET_INLINE void product_tile(const acc_t<T>* a, int64_t a_row, int64_t a_step, const T* b, T* c,
                                 int64_t J, int64_t K, bool add, int64_t skip) {
  using A = acc_t<T>;
  constexpr int kStep = kLanes<T>;
  Vec<A> sum[kRows][kVectors];
  FASTNET_UNROLL for (int r = 0; r < kRows; ++r) {
    FASTNET_UNROLL for (int v = 0; v < kVectors; ++v) sum[r][v] = Vec<A>{};
  }
  for (int64_t j = 0; j < J; ++j) {
    Vec<A> row[kVectors];
    for (int v = 0; v < kVectors; ++v) row[v] = load(b + j * K + v * kStep);
    for (int r = 0; r < kRows; ++r) {
      const Vec<A> factor = splat(a[r * a_row + j * a_step]);
      for (int v = 0; v < kVectors; ++v) sum[r][v] += factor * row[v];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      T* to = c + r * K + v * kStep;
      Vec<A> value = sum[r][v];
      if (add) value += load(to);
      if (skip) {
        value = lane_index<A>() >= splat(static_cast<A>(skip - v * kStep)) ? value : load(to);
      }
      store(to, value);
    }
  }
}

template <class T, int kRows, int kVectors>
static void product_rows(const acc_t<T>* a, int64_t a_row, int64_t a_step, const T* b, T* c,
                         int64_t J, int64_t K, int64_t i, int64_t i_end, bool add,
                         int64_t skip = 0) {
  for (; i + kRows <= i_end; i += kRows) {
    product_tile<T, kRows, kVectors>(a + i * a_row, a_row, a_step, b, c + i * K, J, K, add, skip);
  }
  if constexpr (kRows > 1) {
    // What is left is one tile of its own height: two smaller ones would wait for their additions.
    product_rows<T, kRows - 1, kVectors>(a, a_row, a_step, b, c, J, K, i, i_end, add, skip);
  }
}

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
// A range of k is either as wide as a vector at least, or all of K.
template <class T>
void product_kernel(const acc_t<T>* a, int64_t a_row, int64_t a_step, const T* b, T* c, int64_t J,
                    int64_t K, int64_t i_begin, int64_t i_end, int64_t k_begin, int64_t k_end,
                    bool is_more = false) {
  using A = acc_t<T>;
  constexpr int kStep = kLanes<T>;
  constexpr int kWide = kStep * kProductVectors;
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
  // As many rows of b at a time as keep a tile's columns of them in the first-level cache, and the
  // pages they lie on known. Sums of half types must not pass through memory, and go in one.
  const int64_t depth = sizeof(T) == sizeof(A) ? 256 : J > 0 ? J : 1;
  int64_t j = 0;
  do {
    const int64_t steps = J - j < depth ? J - j : depth;
    const A* a_block = a + j * a_step;
    const T* b_block = b + j * K;
    const bool add = is_more || j > 0;
    int64_t k = k_begin;
    for (; k + kWide <= k_end; k += kWide) {
      product_rows<T, kProductRows, kProductVectors>(a_block, a_row, a_step, b_block + k, c + k,
                                                     steps, K, i_begin, i_end, add);
    }
    // What is left reaches back over columns already done.
    if (k_end - k > kStep && k_end - k_begin >= kWide) {
      const int64_t from = k_end - kWide;
      product_rows<T, kProductRows, kProductVectors>(a_block, a_row, a_step, b_block + from,
                                                     c + from, steps, K, i_begin, i_end, add,
                                                     k - from);
      k = k_end;
    }
    for (; k < k_end; k += kStep) {
      const int64_t from = k + kStep <= k_end ? k : k_end - kStep;
      product_rows<T, kProductRows, 1>(a_block, a_row, a_step, b_block + from, c + from, steps, K,
                                       i_begin, i_end, add, k - from);
    }
    j += steps;
  } while (j < J);
}

#include "linear_relu_sparse_kernels.h"
