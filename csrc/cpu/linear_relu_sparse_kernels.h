// The product of linear_relu's backward pass, c (I, K) = Σ_j a[i, j] · b (J, K)[j, :], where many
// elements of a are zero, as behind a ReLU: a row of c is made of the rows of b that it has a
// factor for, and the others are passed over. Everything is float32. Included by
// linear_relu_kernels.h.

// A tile is one row of c and so many vectors that the rows of b it is made of, some at a time, stay
// in the first-level cache, of 32 kB, and that their sums stay in registers.
inline constexpr int kSparseVectors = kVectorBytes == 64 ? 7 : 13;
inline constexpr int kSparseDepth = 64;
// Rows of c for which factors are listed at a time.
inline constexpr int kSparseRows = 96;

// Of the rows of a tile's columns of b, side by side: with rows of a power of two they would share
// a few places of the cache. Returns whether all are finite: 0 times what is not is NaN.
template <int kVectors>
static bool pack_rows(const float* b, int64_t K, int64_t rows, float* packed, int64_t stride) {
  constexpr int kStep = kLanes<float>;
  Vec<float> zeros[kVectors];
  FASTNET_UNROLL for (int v = 0; v < kVectors; ++v) zeros[v] = Vec<float>{};
  for (int64_t row = 0; row < rows; ++row) {
    FASTNET_UNROLL for (int v = 0; v < kVectors; ++v) {
      const Vec<float> value = load(b + row * K + v * kStep);
      store(packed + row * stride + v * kStep, value);
      zeros[v] += value * 0.0f;
    }
  }
  FASTNET_UNROLL for (int v = 1; v < kVectors; ++v) zeros[0] += zeros[v];
  return reduce_add<float>(zeros[0]) == 0;
}

// The factors of a row of c, of `all` the zeros, too, and where their rows of b lie among those
// packed, whose distance is `stride`. Returns how many there are. Of the `steps` places that both
// lists have, those behind the last factor are written to as well.
static int64_t list_factors(const float* a, int64_t steps, int32_t stride, bool all, float* factors,
                            int32_t* places) {
  int64_t count = 0, j = 0;
  constexpr int kStep = kLanes<float>;
  const Vec<int32_t> always = splat(all ? -1 : 0);
  for (; j + kStep <= steps; j += kStep) {
    Vec<float> factor = load(a + j);
    Vec<int32_t> place = (lane_index<int32_t>() + static_cast<int32_t>(j)) * stride;
    const int picked = pick((factor != Vec<float>{}) | always, &factor, &place);
    store(factors + count, factor);
    store(places + count, place);
    count += picked;
  }
  for (; j < steps; ++j) {
    factors[count] = a[j];
    places[count] = static_cast<int32_t>(j) * stride;
    count += (a[j] != 0) | all;
  }
  return count;
}

// One tile. The first `skip` columns, which another tile has computed, stay as they are.
template <int kVectors>
FASTNET_INLINE void sparse_tile(const float* factors, const int32_t* places, int64_t count,
                                const float* packed, float* c, bool add, int64_t skip) {
  constexpr int kStep = kLanes<float>;
  Vec<float> sum[kVectors];
  FASTNET_UNROLL for (int v = 0; v < kVectors; ++v) sum[v] = Vec<float>{};
  for (int64_t i = 0; i < count; ++i) {
    const Vec<float> factor = splat(factors[i]);
    const float* const row = packed + places[i];
    FASTNET_UNROLL for (int v = 0; v < kVectors; ++v) sum[v] += factor * load(row + v * kStep);
  }
  // Only here: of many rows one sum after the other is more exact than one of all.
  if (add) {
    FASTNET_UNROLL for (int v = 0; v < kVectors; ++v) sum[v] += load(c + v * kStep);
  }
  if (skip) sum[0] = lane_index<float>() >= splat(static_cast<float>(skip)) ? sum[0] : load(c);
  FASTNET_UNROLL for (int v = 0; v < kVectors; ++v) store(c + v * kStep, sum[v]);
}

// c[i, k], or with `is_more` more of it, for i in [i_begin, i_end), k in [k_begin, k_end), a range
// as wide as a vector at least, and of J > 0. Zero times what is infinite or NaN is NaN here, too:
// of b where that stands, no row is passed over.
inline void sparse_product_kernel(const float* a, int64_t a_row, int64_t a_step, const float* b,
                                  float* c, int64_t J, int64_t K, int64_t i_begin, int64_t i_end,
                                  int64_t k_begin, int64_t k_end, bool is_more) {
  constexpr int kStep = kLanes<float>;
  const int64_t width = k_end - k_begin, vectors = (width + kStep - 1) / kStep;
  // Tiles of about the same width, of which the last reaches back over what the one before did.
  const bool has_one = vectors <= kSparseVectors && width % kStep == 0;
  const int64_t fewest = (vectors + kSparseVectors - 1) / kSparseVectors;
  const int64_t tiles = has_one || fewest > 1 ? fewest : 2;
  const int64_t stride = (vectors + tiles - 1) / tiles * kStep;
  const int64_t blocks = (J + kSparseDepth - 1) / kSparseDepth;

  alignas(64) float packed[kSparseDepth * kSparseVectors * kStep];
  float turned[kSparseRows * kSparseDepth], factors[kSparseRows * kSparseDepth];
  int32_t places[kSparseRows * kSparseDepth];
  int64_t counts[kSparseRows];
  for (int64_t i = i_begin; i < i_end; i += kSparseRows) {
    const int64_t rows = i_end - i < kSparseRows ? i_end - i : kSparseRows;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t j = block * J / blocks, steps = (block + 1) * J / blocks - j;
      const float* from = a + i * a_row + j * a_step;
      int64_t from_row = a_row;
      if (a_step != 1) {
        transpose(from, a_step, turned, kSparseDepth, steps, rows);
        from = turned;
        from_row = kSparseDepth;
      }
      const auto list = [&](bool all) {
        for (int64_t r = 0; r < rows; ++r) {
          counts[r] = list_factors(from + r * from_row, steps, static_cast<int32_t>(stride), all,
                                   factors + r * kSparseDepth, places + r * kSparseDepth);
        }
      };
      list(false);
      bool has_all = false;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t first = tile * vectors / tiles, count = (tile + 1) * vectors / tiles - first;
        const int64_t planned = k_begin + first * kStep;
        const int64_t k = planned + count * kStep <= k_end ? planned : k_end - count * kStep;
        with_constant<kSparseVectors>(count, [&](auto constant) {
          constexpr int kVectors = decltype(constant)::value;
          const bool is_finite = pack_rows<kVectors>(b + j * K + k, K, steps, packed, stride);
          if (!is_finite && !has_all) {
            list(true);
            has_all = true;
          }
          for (int64_t r = 0; r < rows; ++r) {
            sparse_tile<kVectors>(factors + r * kSparseDepth, places + r * kSparseDepth, counts[r],
                                  packed, c + (i + r) * K + k, is_more || j > 0, planned - k);
          }
        });
      }
    }
  }
}
