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

// In the order in which they stand on each other.
// clang-format off
#include "cross_entropy_row.h"
#include "cross_entropy_along_classes.h"
#include "cross_entropy_along_positions.h"
// clang-format on

// ---------------------------------------------------------------------------------------------
// The three ways through a chunk of rows

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
    sums.exps +=
        block_exp_sum<T, true>(x + first, count, 2 * count, *shift++, gradient + first, count);
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

// How many rows go together at most, in one vector of sums.
template <class T>
inline constexpr int kMostRows = kLanes<T> < 4 ? kLanes<T> : 4;

// The same of kRows rows of one block each. A row waits for its sums across lanes three times, for
// the maximum, the exponentials' sum and the factor, and the other rows are worked on meanwhile.
template <class T, int kRows>
static acc_t<T> rows_with_gradient(const CrossEntropyCall<T>& call, int64_t row,
                                   const T* (&x)[kRows], T* (&gradient)[kRows], double& divisor) {
  using A = acc_t<T>;
  Sums<A> sums[kRows];
  Vec<A> exp_sums = splat(A(1));
  FASTNET_UNROLL for (int r = 0; r < kRows; ++r) sums[r] = {block_maximum(x[r], call.C), 0, 0, 0};
  FASTNET_UNROLL for (int r = 0; r < kRows; ++r) {
    sums[r].exps = block_exp_sum<T, true>(x[r], call.C, kRows * call.C, shift_of(sums[r].maximum),
                                          gradient[r], kRows * call.C);
    exp_sums[r] = sums[r].exps;
  }
  const Vec<A> log_sums = log(exp_sums);
  A loss = 0;
  for (int r = 0; r < kRows; ++r) {
    loss += finish_row(call, row + r, sums[r], log_sums[r], x[r], 1, divisor);
    const Slopes<A> slopes = slopes_of(call, row + r);
    scale_block(gradient[r], call.C, slopes.slope / sums[r].exps);
    hit_class(call, row + r, A(0), gradient[r], 1, slopes);
  }
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
  int64_t row = begin;
  const auto groups = [&](auto rows) {
    constexpr int kRows = decltype(rows)::value;
    for (; row + kRows <= end; row += kRows) {
      const T* x[kRows];
      T* g[kRows];
      for (int r = 0; r < kRows; ++r) {
        x[r] = call.logits + x_walk.next();
        g[r] = call.gradient + g_walk.next();
      }
      out.loss += rows_with_gradient(call, row, x, g, out.divisor);
    }
  };
  if (call.C <= kRowBlock / 2) groups(std::integral_constant<int, kMostRows<T>>{});
  if (next_block<T>(call.C) == call.C) groups(std::integral_constant<int, 2>{});
  for (; row < end; ++row) {
    const T* const x = call.logits + x_walk.next();
    out.loss += row_with_gradient(call, row, x, call.gradient + g_walk.next(), out.divisor);
  }
}
