// The forward loops of conv_relu_pool, compiled once per instruction set by foreach_isa.h.
//
// A tile is what one pooled output needs: a patch of kernel + 1 by kernel + 1 of the padded input,
// of every channel. Tiles are counted through images, rows and columns, and calculated in blocks,
// whose vectors have one tile to a lane: no lane is idle where a row ends.
//
//   patches [positions][C][tiles]  the tiles of a block, by position in the patch
//           [C][points][tiles]     or transformed: of very few channels, in Winograd's form
//   pooled  [K][tiles]             the block's results, then written in the output's layout

// In the order in which they stand on each other.
// clang-format off
#include "conv_relu_pool_patches.h"
#include "conv_relu_pool_windows.h"
#include "conv_relu_pool_tiles.h"
#include "conv_relu_pool_tiles_forward_kernels.h"
// clang-format on

// Vectors of tiles in a block, at most.
inline constexpr int kMaxVectors = 32;
// Of very few channels kFusedFilters filters go past kProductVectors vectors at a time, up to
// kFusedVectors in a block. Filters stand in groups of kProductFilters, tiles in rows of kFusedRow.
inline constexpr int kProductFilters = 4, kFusedFilters = 2, kProductVectors = 3;
inline constexpr int kFusedVectors = 2 * kProductVectors;
inline constexpr int64_t kFusedRow = (kFusedVectors + 1) * kLanes<float>;
inline constexpr int kDirectFilters = kRegisters == 32 ? 6 : 3;
inline constexpr int64_t kRowsFilter = 4 * 3;  // a filter's points, transformed from row to row

// The direct form's filters stand in groups of kDirectFilters or one less.
struct FilterGroups {
  int64_t K, count;
  explicit FilterGroups(int64_t K) : K(K), count((K + kDirectFilters - 1) / kDirectFilters) {}
  int64_t begin(int64_t group) const { return group * K / count; }
};

// ---------------------------------------------------------------------------------------------
// Filters, rearranged

template <class T>
static bool is_fused(const ConvForward<T>& call) {
  return call.form == ConvForm::patches_of_4;
}
template <class T>
static bool is_by_rows(const ConvForward<T>& call) {
  return call.form == ConvForm::rows_of_4;
}

// Filters are shared out in parts: of a vector of filters, kProductFilters, or a group.
template <class T>
int64_t filter_parts(const ConvForward<T>& call) {
  if (call.form == ConvForm::patches_of_6) return round_up(call.K, kLanes<T>) / kLanes<T>;
  return is_fused(call) ? round_up(call.K, kProductFilters) / kProductFilters
                        : FilterGroups(call.K).count;
}
template <class T>
static int64_t part_begin(const ConvForward<T>& call, int64_t part) {
  if (call.form == ConvForm::patches_of_6) return least(call.K, part * kLanes<T>);
  return is_fused(call) ? least(call.K, part * kProductFilters) : FilterGroups(call.K).begin(part);
}

// How many are rearranged, and go past the input, at a time.
template <class T>
int64_t filter_parts_at_once(const ConvForward<T>& call) {
  const int64_t parts = filter_parts(call);
  if (call.form != ConvForm::patches_of_6) return parts;
  const int64_t fit = most_filters<acc_t<T>>() / (kSidePoints * kLanes<T> * call.C);
  const int64_t vectors = fit / kVectorsAtOnce * kVectorsAtOnce;
  return least(parts, vectors < kVectorsAtOnce ? kVectorsAtOnce : vectors);
}
// What they take, in elements.
template <class T>
int64_t filter_count(const ConvForward<T>& call) {
  if (call.form == ConvForm::patches_of_6) {
    return kSidePoints * kLanes<T> * call.C * filter_parts_at_once(call);
  }
  if (is_by_rows(call)) return kRowsFilter * call.K;
  return is_fused(call) ? kPoints * round_up(call.K, kProductFilters) * call.C
                        : call.K * call.C * call.kernel * call.kernel;
}

// filters[k / 4][point][c][k % 4] = (G g Gᵀ)[point], of filters that there are not 0.
template <class T>
static Magnitude transform_part(const ConvForward<T>& call, int64_t part) {
  using V = Vec4<float>;
  const int64_t C = call.C, step = kProductFilters * C;
  const int64_t first = part_begin(call, part), count = part_begin(call, part + 1) - first;
  V largest = {};
  Vec4<int32_t> is_number = V{} == V{};
  for (int64_t c = 0; c < C; ++c) {
    V g[3][3];
    FASTNET_UNROLL for (int tap = 0; tap < 9; ++tap) g[tap / 3][tap % 3] = V{};
    for (int64_t k = 0; k < count; ++k) {
      const T* from = call.weight + (first + k) * call.weight_at.n + c * call.weight_at.c;
      for (int r = 0; r < 3; ++r) {
        for (int s = 0; s < 3; ++s) {
          g[r][s][k] = widen(from[r * call.weight_at.y + s * call.weight_at.x]);
        }
      }
    }
    FASTNET_UNROLL for (int tap = 0; tap < 9; ++tap) {
      const V value = g[tap / 3][tap % 3], size = value < V{} ? -value : value;
      largest = largest < size ? size : largest;
      is_number &= value == value;
    }
    V half[4][3];
    for (int s = 0; s < 3; ++s) {
      const V outer = (g[0][s] + g[2][s]) * 0.5f, inner = g[1][s] * 0.5f;
      half[0][s] = g[0][s];
      half[1][s] = outer + inner;
      half[2][s] = outer - inner;
      half[3][s] = g[2][s];
    }
    float* to = call.arranged_filters + part * kPoints * step + c * kProductFilters;
    for (int r = 0; r < 4; ++r) {
      const V outer = (half[r][0] + half[r][2]) * 0.5f, inner = half[r][1] * 0.5f;
      const V row[4] = {half[r][0], outer + inner, outer - inner, half[r][2]};
      for (int s = 0; s < 4; ++s) store_4(to + (r * 4 + s) * step, row[s]);
    }
  }
  LargestOf<float> all;
  for (int k = 0; k < 4; ++k) {
    all.add(largest[k]);
    all.is_number &= is_number[k] != 0;
  }
  return all.magnitude();
}

// filters[group][row][s][k in group] = (G g)[row][s]
template <class T>
static Magnitude transform_group(const ConvForward<T>& call, int64_t k_begin, int64_t k_end) {
  LargestOf<float> all;
  const int64_t count = k_end - k_begin;
  float* const to = call.arranged_filters + k_begin * kRowsFilter;
  for (int64_t k = 0; k < count; ++k) {
    for (int s = 0; s < 3; ++s) {
      const T* const from = call.weight + (k_begin + k) * call.weight_at.n + s * call.weight_at.x;
      float g[3];
      for (int r = 0; r < 3; ++r) {
        g[r] = widen(from[r * call.weight_at.y]);
        all.add(g[r]);
      }
      const float outer = (g[0] + g[2]) * 0.5f, inner = g[1] * 0.5f;
      const float rows[4] = {g[0], outer + inner, outer - inner, g[2]};
      for (int r = 0; r < 4; ++r) to[(r * 3 + s) * count + k] = rows[r];
    }
  }
  return all.magnitude();
}

// Parts [begin, end). The direct form's: filters[group][c][r][s][k in group].
// Returns the magnitude of the filters and, where it matters, the bias.
template <class T>
Magnitude arrange_filters_kernel(const ConvForward<T>& call, int64_t begin, int64_t end) {
  const int64_t C = call.C, kernel = call.kernel;
  LargestOf<acc_t<T>> bias;
  for (int64_t k = part_begin(call, begin); call.bias && k < part_begin(call, end); ++k) {
    bias.add(widen(call.bias[k]));
  }
  // Whatever it is, the direct form can add it, and the others where nothing overflows. (An
  // infinite one makes the elements of a window equal, of which the first wins.)
  Magnitude met = Magnitude::small;
  if (bias.magnitude(kLargestOfLarge) != Magnitude::small) met = Magnitude::finite;
  for (int64_t part = begin; part < end; ++part) {
    if constexpr (sizeof(acc_t<T>) == sizeof(float)) {
      if (call.form == ConvForm::patches_of_6) {
        const int64_t k = part_begin(call, part);
        const auto transform = call.kernel == 3 ? transform_filters<3, T> : transform_filters<5, T>;
        met = larger(met,
                     transform(call.weight + k * call.weight_at.n, part_begin(call, part + 1) - k,
                               call.weight_at.n, C, call.weight_at.c, call.weight_at,
                               call.arranged_filters +
                                   (part - call.first_part) * kSidePoints * C * kLanes<T>));
        continue;
      }
      if (is_fused(call)) {
        met = larger(met, transform_part(call, part));
        continue;
      }
      if (is_by_rows(call)) {
        met =
            larger(met, transform_group(call, part_begin(call, part), part_begin(call, part + 1)));
        continue;
      }
    }
    const int64_t k_begin = part_begin(call, part), k_end = part_begin(call, part + 1);
    LargestOf<acc_t<T>> filters;
    if (!call.is_arranged) {
      const int64_t size = C * kernel * kernel;
      filters.add_all(call.filters + k_begin * size, (k_end - k_begin) * size);
      met = larger(met, filters.magnitude());
      continue;
    }
    acc_t<T>* to = call.arranged_filters + k_begin * C * kernel * kernel;
    for (int64_t c = 0; c < C; ++c) {
      for (int64_t r = 0; r < kernel; ++r) {
        for (int64_t s = 0; s < kernel; ++s) {
          const T* from =
              call.weight + c * call.weight_at.c + r * call.weight_at.y + s * call.weight_at.x;
          for (int64_t k = k_begin; k < k_end; ++k) {
            const acc_t<T> value = widen(from[k * call.weight_at.n]);
            filters.add(value);
            *to++ = value;
          }
        }
      }
    }
    met = larger(met, filters.magnitude());
  }
  return met;
}

// ---------------------------------------------------------------------------------------------
// Patches

// Where everything stands in a thread's scratch memory, in elements.
template <class T>
struct ForwardPlan {
  using A = acc_t<T>;
  int64_t half;         // the even columns of a row of a strip, or the odd ones
  int64_t strip_rows;   // of tiles, in a strip
  int64_t strip_plane;  // from one channel of a strip to the next
  int64_t tiles;        // in a block
  int64_t patch_row;    // from one channel of the patches to the next
  int64_t plane;        // from one point of the patches to the next
  int64_t strip_at, patches_at, pooled_at, codes_at, end;

  explicit ForwardPlan(const ConvForward<T>& call) {
    constexpr int64_t kStripBytes = 64 * 1024, kPatchBytes = 24 * 1024;
    constexpr int64_t kSize = sizeof(A);
    const int64_t C = call.C, points = (call.kernel + 1) * (call.kernel + 1);
    half = call.Q + call.kernel / 2;
    strip_rows = least(call.P, kStripBytes / (4 * C * half * kSize));
    if (strip_rows < 1) strip_rows = 1;
    // The more tiles, the longer the stretches in which the output is written; but their patches
    // are to stay in the cache.
    int64_t vectors = kPatchBytes / (points * C * kSize * kLanes<T>);
    vectors = least(vectors, (call.most_units + kLanes<T> - 1) / kLanes<T>);
    if (is_fused(call)) {
      vectors = least(vectors / kProductVectors * kProductVectors, kFusedVectors);
      if (vectors < kProductVectors) vectors = kProductVectors;
    }
    vectors = vectors < 1 ? 1 : least(vectors, kMaxVectors);
    tiles = vectors * kLanes<T>;
    // Patches are written a vector at a time, past the end of a row of tiles, and read so.
    constexpr int64_t kSlack = 4 * kLanes<T>, kLine = 64 / kSize;
    patch_row = is_fused(call) ? kPoints * kFusedRow : tiles + kLanes<T>;
    plane = is_fused(call) ? kFusedRow : off_pages<A>(C * patch_row);
    strip_plane = off_pages<A>((2 * strip_rows + call.kernel - 1) * 2 * half);
    strip_at = 0;
    patches_at = round_up(strip_at + C * strip_plane + kSlack, kLine);
    pooled_at = patches_at + round_up(is_fused(call) ? C * patch_row : points * plane, kLine);
    codes_at = pooled_at + call.K * tiles;
    end = codes_at + call.K * tiles / kSize + kSlack;
  }
};

template <class T>
int64_t forward_scratch(const ConvForward<T>& call) {
  if constexpr (sizeof(acc_t<T>) == sizeof(float)) {
    if (call.form == ConvForm::patches_of_6) return TilesForwardPlan<T>(call).end;
  }
  return ForwardPlan<T>(call).end;
}

// V of `count` neighbouring tiles, and some beyond, of a channel. A function of its own, in which
// sixteen addresses of a known distance need no registers.
__attribute__((noinline)) static void transform_row(const float* strip, int64_t half, float* to,
                                                    int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<float>) {
    transform_patch(strip + i, half, to + i, kFusedRow);
  }
}

// Bᵀ d, the same of the transform from row to row only.
FASTNET_INLINE void transform_by_rows(const float* strip, int64_t half, float* to, int64_t plane,
                                      int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<float>) {
    FASTNET_UNROLL for (int s = 0; s < 4; ++s) {
      Vec<float> d[4];
      FASTNET_UNROLL for (int r = 0; r < 4; ++r) {
        d[r] = load_column(strip + i + r * 2 * half, half, s);
      }
      store(to + i + s * plane, d[0] - d[2]);
      store(to + i + (4 + s) * plane, d[1] + d[2]);
      store(to + i + (8 + s) * plane, d[2] - d[1]);
      store(to + i + (12 + s) * plane, d[1] - d[3]);
    }
  }
}

// What the strip in the scratch memory is.
struct Strip {
  int64_t id = -1;
  bool is_small = true;
};

// The patches of tiles [first, last) of a block, one row of tiles at a time. Returns whether all of
// them are small.
template <class T, int kKernel>
static bool gather_patches(const ConvForward<T>& call, const ForwardPlan<T>& plan, int64_t first,
                           int64_t last, Strip* at_hand, acc_t<T>* scratch) {
  using A = acc_t<T>;
  constexpr int kPatch = kKernel + 1;
  A* const strip = scratch + plan.strip_at;
  bool is_small = true;
  for (int64_t tile = first; tile < last;) {
    const int64_t n = tile / (call.P * call.Q), p = tile / call.Q % call.P, q = tile % call.Q;
    // As far as the strip goes, tiles lie in rows side by side.
    const int64_t strips = (call.P + plan.strip_rows - 1) / plan.strip_rows;
    const int64_t p_first = p / plan.strip_rows * plan.strip_rows;
    const int64_t p_rows = least(plan.strip_rows, call.P - p_first);
    const int64_t rows = 2 * p_rows + kKernel - 1;
    const int64_t id = n * strips + p / plan.strip_rows;
    if (id != at_hand->id) {
      *at_hand = {id, fill_strip(call, plan.half, plan.strip_plane, n, 2 * p_first, rows, strip)};
    }
    is_small &= at_hand->is_small;
    const int64_t stop = least(last, (n * call.P + p_first + p_rows) * call.Q);
    for (int64_t c = 0; c < call.C; ++c) {
      int64_t row = p - p_first, column = q;
      for (int64_t t = tile; t < stop;) {
        // What is written beyond the end of the row, the next row writes over.
        const int64_t count = least(stop - t, call.Q - column);
        const A* from = strip + c * plan.strip_plane + 2 * row * 2 * plan.half + column;
        A* to = scratch + plan.patches_at + c * plan.patch_row + (t - first);
        if constexpr (sizeof(A) == sizeof(float) && kKernel == 3) {
          if (is_fused(call)) transform_row(from, plan.half, to, count);
          if (is_by_rows(call)) transform_by_rows(from, plan.half, to, plan.plane, count);
        }
        for (int64_t i = 0; i < count && call.form == ConvForm::direct; i += kLanes<T>) {
          for (int r = 0; r < kPatch; ++r) {
            for (int s = 0; s < kPatch; ++s) {
              store(to + i + (r * kPatch + s) * plan.plane,
                    load_column(from + i + r * 2 * plan.half, plan.half, s));
            }
          }
        }
        t += count;
        ++row;
        column = 0;
      }
    }
    tile = stop;
  }
  return is_small;
}

// ---------------------------------------------------------------------------------------------
// Results

// Where the results of a vector of tiles go: a filter's `next` elements after those of the one
// before.
template <class T>
struct Target {
  T* pooled;
  uint8_t* codes;
  int64_t next;
};

// Of a block's vectors: into the output where their tiles stand side by side there, else through
// the scratch memory.
template <class T>
struct Targets {
  Target<T> of[kMaxVectors];
  bool is_output[kMaxVectors];
  Targets(const ConvForward<T>& call, const ForwardPlan<T>& plan, int64_t first, int64_t last,
          acc_t<T>* scratch) {
    T* const pooled = reinterpret_cast<T*>(scratch + plan.pooled_at);
    uint8_t* const codes =
        call.codes ? reinterpret_cast<uint8_t*>(scratch + plan.codes_at) : nullptr;
    const int64_t image = call.P * call.Q;
    int64_t n = first / image, window = first % image;
    for (int64_t at = 0; at < plan.tiles; at += kLanes<T>) {
      const bool is_whole = window + kLanes<T> <= image && first + at + kLanes<T> <= last;
      const int64_t to = n * call.output_at.n + window;
      const int64_t v = at / kLanes<T>;
      is_output[v] = call.output_at.x == 1 && is_whole;
      of[v] = is_output[v] ? Target<T>{call.output + to, codes_at(call.codes, to), call.output_at.c}
                           : Target<T>{pooled + at, codes_at(codes, at), plan.tiles};
      for (window += kLanes<T>; window >= image; window -= image) ++n;
    }
  }
};

// What of a block's results stands in the scratch memory, into the output: filters [k_begin, k_end)
// of tiles [first, last).
template <class T>
static void write_block(const ConvForward<T>& call, const ForwardPlan<T>& plan, int64_t first,
                        int64_t last, int64_t k_begin, int64_t k_end, const Targets<T>& targets,
                        const acc_t<T>* scratch) {
  const int64_t image = call.P * call.Q, tiles = plan.tiles;
  const T* const pooled = reinterpret_cast<const T*>(scratch + plan.pooled_at);
  const uint8_t* const codes = reinterpret_cast<const uint8_t*>(scratch + plan.codes_at);
  for (int64_t tile = first; tile < last;) {
    const int64_t in_vector = kLanes<T> - (tile - first) % kLanes<T>;
    if (targets.is_output[(tile - first) / kLanes<T>]) {
      tile += in_vector;
      continue;
    }
    const int64_t n = tile / image, window = tile % image;
    int64_t count = least(last - tile, image - window);
    if (call.output_at.x == 1) count = least(count, in_vector);
    const int64_t from = k_begin * tiles + (tile - first);
    const int64_t to =
        n * call.output_at.n + k_begin * call.output_at.c + window * call.output_at.x;
    if (call.output_at.x == 1) {  // the windows of a channel stand side by side; part of a vector
      for (int64_t k = 0; k < k_end - k_begin; ++k) {
        for (int64_t i = 0; i < count; ++i) {
          call.output[to + k * call.output_at.c + i] = pooled[from + k * tiles + i];
        }
        for (int64_t i = 0; call.codes && i < count; ++i) {
          call.codes[to + k * call.output_at.c + i] = codes[from + k * tiles + i];
        }
      }
    } else {  // channels_last
      transpose(pooled + from, tiles, call.output + to, call.output_at.x, k_end - k_begin, count);
      if (call.codes) {
        transpose(codes + from, tiles, call.codes + to, call.output_at.x, k_end - k_begin, count);
      }
    }
    tile += count;
  }
}

// ---------------------------------------------------------------------------------------------
// Winograd's form

// Of very few channels, kFusedFilters filters of kProductVectors vectors: products and Aᵀ from the
// left in registers, a column of points after the other, and so half as many results to memory as
// there are points. sums[filter][column][row][vector]: in any other order the compiler finds sums
// that two turns of the loop over filters seem to share, keeps them, and spills.
template <int kChannels>
FASTNET_INLINE void fused_products(
    const float* filters, const float* patches,
    float (&sums)[kFusedFilters][4][2][kProductVectors][kLanes<float>]) {
  using V = Vec<float>;
  constexpr int kFilters = kFusedFilters, kVectors = kProductVectors;
#pragma GCC unroll 1
  for (int column = 0; column < 4; ++column) {
    V upper[kFilters][kVectors], lower[kFilters][kVectors];
    const auto multiply = [&](int row, int c, const auto& add) __attribute__((always_inline)) {
      const int point = 4 * row + column;
      const float* const w = filters + (point * kChannels + c) * kProductFilters;
      V x[kVectors];
      FASTNET_UNROLL for (int v = 0; v < kVectors; ++v) {
        x[v] = in_register(load(patches + (c * kPoints + point) * kFusedRow + v * kLanes<float>));
      }
      FASTNET_UNROLL for (int k = 0; k < kFilters; ++k) {
        FASTNET_UNROLL for (int v = 0; v < kVectors; ++v) add(k, v, splat(w[k]) * x[v]);
      }
    };
    // The second row and the third first, whose sum goes to one result, their difference to the
    // other.
    FASTNET_UNROLL for (int c = 0; c < kChannels; ++c) {
      multiply(1, c, [&](int k, int v, V product) __attribute__((always_inline)) {
        upper[k][v] = c == 0 ? product : upper[k][v] + product;
      });
      multiply(2, c, [&](int k, int v, V product) __attribute__((always_inline)) {
        lower[k][v] = c == 0 ? product : lower[k][v] + product;
      });
    }
    FASTNET_UNROLL for (int k = 0; k < kFilters; ++k) {
      FASTNET_UNROLL for (int v = 0; v < kVectors; ++v) {
        const V sum = upper[k][v] + lower[k][v];
        lower[k][v] = upper[k][v] - lower[k][v];
        upper[k][v] = sum;
      }
    }
    FASTNET_UNROLL for (int c = 0; c < kChannels; ++c) {
      multiply(0, c, [&](int k, int v, V product) __attribute__((always_inline)) {
        upper[k][v] += product;
      });
      multiply(3, c, [&](int k, int v, V product) __attribute__((always_inline)) {
        lower[k][v] -= product;
      });
    }
    FASTNET_UNROLL for (int k = 0; k < kFilters; ++k) {
      FASTNET_UNROLL for (int v = 0; v < kVectors; ++v) {
        store(sums[k][column][0][v], upper[k][v]);
        store(sums[k][column][1][v], lower[k][v]);
      }
    }
  }
}

// The same times A, bias, ReLU and maximum: filters [k_begin, k_end) of `tiles` tiles. All vectors
// of a filter one after the other, so that a line of the output is whole before it leaves the
// cache. It is asked for before the products: a store that has to wait for its line keeps those of
// the products after it waiting, too.
template <int kChannels, class T>
static void fused_block(const ConvForward<T>& call, const float* patches, const Target<T>* targets,
                        int64_t tiles, int64_t k_begin, int64_t k_end) {
  using V = Vec<float>;
  constexpr int kVectors = kProductVectors;
  constexpr int64_t kGroup = kPoints * kChannels * kProductFilters;
  for (int64_t k_first = k_begin; k_first < k_end; k_first += kFusedFilters) {
    const float* const filters =
        call.filters + k_first / kProductFilters * kGroup + k_first % kProductFilters;
    const int count = static_cast<int>(least(kFusedFilters, k_end - k_first));
    for (int64_t v_first = 0; v_first * kLanes<float> < tiles; v_first += kVectors) {
      const Target<T>* const to = targets + v_first;
      for (int i = 0; i < count; ++i) {
        const int64_t k = k_first + i;
        FASTNET_UNROLL for (int v = 0; v < kVectors; ++v)
            __builtin_prefetch(to[v].pooled + k * to[v].next);
        __builtin_prefetch(to[0].codes + k * to[0].next);
      }
      alignas(64) float sums[kFusedFilters][4][2][kVectors][kLanes<float>];
      fused_products<kChannels>(filters, patches + v_first * kLanes<float>, sums);
      for (int i = 0; i < count; ++i) {
        const int64_t k = k_first + i;
        V y[kVectors][4], bias[kVectors];
        T* pooled[kVectors];
        uint8_t* codes[kVectors];
        FASTNET_UNROLL for (int v = 0; v < kVectors; ++v) {
          pooled[v] = to[v].pooled + k * to[v].next;
          codes[v] = codes_at(to[v].codes, k * to[v].next);
          bias[v] = splat(call.bias ? widen(call.bias[k]) : 0.0f);
          FASTNET_UNROLL for (int row = 0; row < 2; ++row) {
            const auto m = [&](int column) __attribute__((always_inline)) {
              return load(sums[i][column][row][v]);
            };
            y[v][2 * row] = m(0) + (m(1) + m(2));
            y[v][2 * row + 1] = (m(1) - m(2)) - m(3);
          }
        }
        finish_windows<false, float, T, kVectors>(y, bias, pooled, codes);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Winograd's form from row to row only, of one channel
//
//   Y = Aᵀ (U * V)    U = G g of the filter g, V = Bᵀ d of the patch d, * from column to column
//
// 24 multiplications instead of 36, and no sums that go through memory: with one channel, the 16
// multiplications of the form in both directions wait for their operands. Where a window's patches
// are alike, as on a background, its elements stay equal: the first wins, as in torch.

// kFilters filters of all vectors of a block.
template <class T, int kFilters>
static void rows_group(const float* patches, int64_t plane, int64_t tiles, const float* filters,
                       const T* bias, const Target<T>* targets, int64_t k_first) {
  using V = Vec<float>;
  for (int64_t at = 0; at < tiles; at += kLanes<float>) {
    V upper[kFilters][2], lower[kFilters][2];
    // Row `row` of V with that of U, to the sums of both columns.
    const auto add_row = [&](int row, V(&sums)[kFilters][2],
                             const auto& add) __attribute__((always_inline)) {
      FASTNET_UNROLL for (int s = 0; s < 3; ++s) {
        V w[kFilters];
        FASTNET_UNROLL for (int k = 0; k < kFilters; ++k) {
          w[k] = splat(filters[(row * 3 + s) * kFilters + k]);
        }
        FASTNET_UNROLL for (int column = 0; column < 2; ++column) {
          const V x = in_register(load(patches + at + (4 * row + s + column) * plane));
          FASTNET_UNROLL for (int k = 0; k < kFilters; ++k) {
            V* const sum = &sums[k][column];
            *sum = in_register(add(s, *sum, w[k] * x));
          }
        }
      }
    };
    const auto begin = [](int s, V sum, V product) __attribute__((always_inline)) {
      return s == 0 ? product : sum + product;
    };
    add_row(1, upper, begin);
    add_row(2, lower, begin);
    FASTNET_UNROLL for (int k = 0; k < kFilters; ++k) {
      FASTNET_UNROLL for (int column = 0; column < 2; ++column) {
        const V sum = upper[k][column] + lower[k][column];
        lower[k][column] = in_register(upper[k][column] - lower[k][column]);
        upper[k][column] = in_register(sum);
      }
    }
    add_row(0, upper,
            [](int, V sum, V product) __attribute__((always_inline)) { return sum + product; });
    add_row(3, lower,
            [](int, V sum, V product) __attribute__((always_inline)) { return sum - product; });
    const Target<T>& to = targets[at / kLanes<float>];
    FASTNET_UNROLL for (int i = 0; i < kFilters; ++i) {
      const V y[1][4] = {{upper[i][0], upper[i][1], lower[i][0], lower[i][1]}};
      const int64_t k = k_first + i;
      const V its_bias[1] = {splat(bias ? widen(bias[k]) : 0.0f)};
      finish_windows<false, float, T, 1>(y, its_bias, {to.pooled + k * to.next},
                                         {codes_at(to.codes, k * to.next)});
    }
  }
}

template <class T, int kFilters = kDirectFilters, class... Arguments>
static void rows_groups(int64_t filters, Arguments... arguments) {
  if (filters == kFilters) {
    rows_group<T, kFilters>(arguments...);
  } else if constexpr (kFilters > 1) {
    rows_groups<T, kFilters - 1>(filters, arguments...);
  }
}

template <class T>
static void rows_block(const ConvForward<T>& call, const float* patches, int64_t plane,
                       const Target<T>* targets, int64_t tiles, int64_t part_first,
                       int64_t part_last) {
  for (int64_t part = part_first; part < part_last; ++part) {
    const int64_t k = part_begin(call, part), count = part_begin(call, part + 1) - k;
    rows_groups<T>(count, patches, plane, tiles, call.filters + k * kRowsFilter, call.bias, targets,
                   k);
  }
}

// ---------------------------------------------------------------------------------------------
// The direct form

// One vector of tiles for kFilters filters.
template <bool kMayBeNaN, class A, class T, int kKernel, int kFilters>
static void direct_tile(const A* patches, int64_t patch_row, int64_t plane, const A* filters,
                        int64_t next_filter, int64_t next_tap, const A* bias, int64_t C,
                        Target<T> to) {
  using V = Vec<A>;
  constexpr int kPatch = kKernel + 1;
  V sum[kFilters][4];
  FASTNET_UNROLL for (int k = 0; k < kFilters; ++k) {
    FASTNET_UNROLL for (int i = 0; i < 4; ++i) sum[k][i] = splat(bias[k]);
  }
  for (int64_t c = 0; c < C; ++c) {
    const A* x = patches + c * patch_row;
#pragma GCC unroll 1
    for (int r = 0; r < kKernel; ++r) {
      const A *upper = x + r * kPatch * plane, *lower = upper + kPatch * plane;
#pragma GCC unroll 1
      for (int s = 0; s < kKernel; ++s) {
        // In this order all there is fits into 16 registers.
        V w[kFilters];
        FASTNET_UNROLL for (int k = 0; k < kFilters; ++k) w[k] = splat(filters[k * next_filter]);
        FASTNET_UNROLL for (int i = 0; i < 4; ++i) {
          const V value = load((i < 2 ? upper : lower) + (s + i % 2) * plane);
          FASTNET_UNROLL for (int k = 0; k < kFilters; ++k) sum[k][i] += w[k] * value;
        }
        filters += next_tap;
      }
    }
  }
  T* pooled[kFilters];
  uint8_t* codes[kFilters];
  FASTNET_UNROLL for (int k = 0; k < kFilters; ++k) {
    pooled[k] = to.pooled + k * to.next;
    codes[k] = codes_at(to.codes, k * to.next);
  }
  finish_windows<kMayBeNaN, A, T, kFilters>(sum, nullptr, pooled, codes);
}

template <class A, class T, int kKernel, int kFilters = kDirectFilters, class... Arguments>
static void direct_group(int64_t filters, bool may_be_nan, Arguments... arguments) {
  if (filters != kFilters) {
    if constexpr (kFilters > 1) {
      direct_group<A, T, kKernel, kFilters - 1>(filters, may_be_nan, arguments...);
    }
  } else if (may_be_nan) {
    direct_tile<true, A, T, kKernel, kFilters>(arguments...);
  } else {
    direct_tile<false, A, T, kKernel, kFilters>(arguments...);
  }
}

// Filters in parts [part_first, part_last) of a block's `count` tiles.
template <class T, int kKernel>
static void direct_block(const ConvForward<T>& call, const ForwardPlan<T>& plan,
                         const Targets<T>& targets, int64_t tiles, int64_t part_first,
                         int64_t part_last, bool may_be_nan, acc_t<T>* scratch) {
  using A = acc_t<T>;
  const int64_t C = call.C;
  for (int64_t part = part_first; part < part_last; ++part) {
    const int64_t k = part_begin(call, part), k_stop = part_begin(call, part + 1);
    A bias[kDirectFilters] = {};
    for (int64_t i = k; call.bias && i < k_stop; ++i) bias[i - k] = widen(call.bias[i]);
    const int64_t size = C * kKernel * kKernel, count = k_stop - k;
    const A* const filters = call.filters + k * size;
    const int64_t next_filter = call.is_arranged ? 1 : size;
    const int64_t next_tap = call.is_arranged ? count : 1;
    for (int64_t v = 0; v * kLanes<T> < tiles; ++v) {
      Target<T> to = targets.of[v];
      to.pooled += k * to.next;
      to.codes = codes_at(to.codes, k * to.next);
      direct_group<A, T, kKernel>(count, may_be_nan, scratch + plan.patches_at + v * kLanes<T>,
                                  plan.patch_row, plan.plane, filters, next_filter, next_tap, bias,
                                  C, to);
    }
  }
}

// ---------------------------------------------------------------------------------------------
// All forms

// Threads share out tiles, or rows of them: how many there are, and in a block.
template <class T>
int64_t forward_units(const ConvForward<T>& call) {
  if (call.form == ConvForm::patches_of_6) return call.N * TileGrid<T>(call).rows;
  return call.N * call.P * call.Q;
}
template <class T>
int64_t block_units(const ConvForward<T>& call) {
  if constexpr (sizeof(acc_t<T>) == sizeof(float)) {
    if (call.form == ConvForm::patches_of_6) return TilesForwardPlan<T>(call).rows;
  }
  return ForwardPlan<T>(call).tiles;
}

// Units [begin, end) of the filters in parts [part_first, part_last). Returns false where the input
// has elements that Winograd's form cannot take; what was written is then worthless.
template <class T>
bool conv_forward_kernel(const ConvForward<T>& call, int64_t begin, int64_t end, int64_t part_first,
                         int64_t part_last, acc_t<T>* scratch) {
  if constexpr (sizeof(acc_t<T>) == sizeof(float)) {
    if (call.form == ConvForm::patches_of_6) {
      return tiles_forward(call, begin, end, part_first, part_last, scratch);
    }
  }
  const ForwardPlan<T> plan(call);
  const int64_t k_begin = part_begin(call, part_first), k_end = part_begin(call, part_last);
  Strip strip;
  for (int64_t i = plan.strip_at; i < plan.patches_at; ++i) scratch[i] = 0;
  for (int64_t first = begin; first < end; first += plan.tiles) {
    const int64_t last = least(end, first + plan.tiles), count = last - first;
    const Targets<T> targets(call, plan, first, last, scratch);
    const bool is_small = call.kernel == 3
                              ? gather_patches<T, 3>(call, plan, first, last, &strip, scratch)
                              : gather_patches<T, 5>(call, plan, first, last, &strip, scratch);
    if (is_fused(call)) {
      if constexpr (sizeof(acc_t<T>) == sizeof(float)) {
        if (!is_small) return false;
        const auto block = call.C == 2   ? fused_block<2, T>
                           : call.C == 3 ? fused_block<3, T>
                                         : fused_block<4, T>;
        block(call, scratch + plan.patches_at, targets.of, count, k_begin, k_end);
      }
    } else if (is_by_rows(call)) {
      if constexpr (sizeof(acc_t<T>) == sizeof(float)) {
        if (!is_small) return false;
        rows_block(call, scratch + plan.patches_at, plan.plane, targets.of, count, part_first,
                   part_last);
      }
    } else {
      const bool may_be_nan = !is_small || !call.filters_are_small;
      const auto block = call.kernel == 3 ? direct_block<T, 3> : direct_block<T, 5>;
      block(call, plan, targets, count, part_first, part_last, may_be_nan, scratch);
    }
    write_block(call, plan, first, last, k_begin, k_end, targets, scratch);
  }
  return true;
}

// ---------------------------------------------------------------------------------------------
// Bias, ReLU and maximum by themselves, for a convolution that a library computed: rows
// [begin, end) of the pooled output, counted through images and channels, or for channels_last
// through images. z is laid out as the output is.

template <class V, int... kLane>
FASTNET_INLINE void deinterleave(V a, V b, V* even, V* odd, LaneList<kLane...>) {
  *even = __builtin_shufflevector(a, b, (2 * kLane)...);
  *odd = __builtin_shufflevector(a, b, (2 * kLane + 1)...);
}

template <class T>
void relu_pool_kernel(const T* z, Strides4 z_at, T* output, uint8_t* codes, Strides4 at, int64_t K,
                      int64_t P, int64_t Q, bool channels_last, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  constexpr int kStep = kLanes<T>;
  const int64_t rows_of_channels = channels_last ? 1 : K;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t p = row % P, k = row / P % rows_of_channels, n = row / P / rows_of_channels;
    const T* const upper = z + n * z_at.n + k * z_at.c + 2 * p * z_at.y;
    const T* const lower = upper + z_at.y;
    const int64_t to = n * at.n + k * at.c + p * at.y;
    const auto one = [&](int64_t from, int64_t offset) {
      A most = widen(upper[from]);
      uint8_t code = 0;
      for (int j = 1; j < 4; ++j) {
        const A y = widen((j < 2 ? upper : lower)[from + j % 2 * z_at.x]);
        if (y > most || y != y) {
          most = y;
          code = static_cast<uint8_t>(j);
        }
      }
      narrow(most <= 0 ? A(0) : most, output + to + offset);
      if (codes) codes[to + offset] = most <= 0 ? kDead : code;
    };
    const auto vector = [&](const Vec<A>(&y)[1][4], int64_t offset) {
      finish_windows<true, A, T, 1>(y, nullptr, {output + to + offset},
                                    {codes_at(codes, to + offset)});
    };
    if (channels_last) {
      for (int64_t q = 0; q < Q; ++q) {
        const int64_t from = 2 * q * z_at.x, offset = q * at.x;
        int64_t i = 0;
        for (; i + kStep <= K; i += kStep) {
          const Vec<A> y[1][4] = {{load(upper + from + i), load(upper + from + i + z_at.x),
                                   load(lower + from + i), load(lower + from + i + z_at.x)}};
          vector(y, offset + i);
        }
        for (; i < K; ++i) one(from + i, offset + i);
      }
      continue;
    }
    int64_t q = 0;
    for (; q + kStep <= Q; q += kStep) {
      constexpr typename MakeLanes<kStep>::type lanes{};
      Vec<A> y[1][4];
      deinterleave(load(upper + 2 * q), load(upper + 2 * q + kStep), y[0], y[0] + 1, lanes);
      deinterleave(load(lower + 2 * q), load(lower + 2 * q + kStep), y[0] + 2, y[0] + 3, lanes);
      vector(y, q);
    }
    for (; q < Q; ++q) one(2 * q, q);
  }
}
