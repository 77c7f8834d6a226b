// exp and log. No include guard: simd.h includes this once per instruction set.

// ---------------------------------------------------------------------------------------------
// exp(x) for x up to 88 (float) or 709 (double), to 2 ulp. Where the result would be subnormal it
// may be 0, at -infinity it is; NaN stays NaN.
//
// exp(x) = 2^n · exp(r) with n = round(x / ln 2) and |r| <= ln 2 / 2. Adding 1.5 · 2^(digits)
// rounds to an integer, and leaves n in the lowest bits, from where it is shifted into the
// exponent. ln 2 is subtracted in two parts, of which the first times n is exact.

#if defined(__x86_64__)
// Of 16 lanes: x = (16 m + i) ln 2 / 16 + r with |r| <= ln 2 / 32, and 2^(i / 16) by its lower bits
// i from a vector, less those that m's exponent brings along when 16 m + i is shifted into its
// place. The polynomial is three terms shorter then, and a vector waits less. Of what would be
// subnormal something smaller is left.
template <int kCount>
FASTNET_INLINE void exp_each_of_16(Vec<float> (&x)[kCount]) {
  using V = Vec<float>;
  constexpr float kRounds = 12582912.0f + 127 * 16, kSmallest = -88.0296919f;  // -127 ln 2
  alignas(64) static constexpr uint32_t kRoots[16] = {
      0x00000000, 0xfffdaac3, 0xfffb95c2, 0xfff9c3d3, 0xfff837f0, 0xfff6f532,
      0xfff5fed7, 0xfff5583f, 0xfff504f3, 0xfff508a4, 0xfff5672a, 0xfff6248c,
      0xfff744fd, 0xfff8ccdf, 0xfffac0c7, 0xfffd257d};
  Vec<uint32_t> roots;
  __builtin_memcpy(&roots, kRoots, sizeof roots);
  V shifted[kCount], r[kCount], q[kCount];
  FASTNET_UNROLL for (int i = 0; i < kCount; ++i) x[i] = maximum<float>(x[i], splat(kSmallest));
  FASTNET_UNROLL for (int i = 0; i < kCount; ++i) shifted[i] = x[i] * 23.0831207f + kRounds;
  FASTNET_UNROLL for (int i = 0; i < kCount; ++i) {
    const V n = shifted[i] - kRounds;
    r[i] = (x[i] - n * (0.693359375f / 16)) + n * (2.12194440e-4f / 16);
  }
  // exp(r) = 1 + r + r² q(r)
  FASTNET_UNROLL for (int i = 0; i < kCount; ++i) q[i] = r[i] * 0.166666667f + 0.50001955f;
  FASTNET_UNROLL for (int i = 0; i < kCount; ++i) q[i] = (q[i] * r[i] + 1.0f) * r[i];
  FASTNET_UNROLL for (int i = 0; i < kCount; ++i) {
    const Vec<uint32_t> bits = (Vec<uint32_t>)shifted[i];
    Vec<uint32_t> root;
    __asm__("vpermd %1, %2, %0" : "=v"(root) : "v"(roots), "v"(bits));
    const V power = (V)(root + (bits << 19));
    x[i] = power + power * q[i];
  }
}
#endif

// Of several vectors step by step: each step waits for the one before, and a processor looks too
// few instructions ahead to begin with the next vector meanwhile. The exponent's bias is added with
// what rounds, and n is never below -127, whose power is 0: no comparison, no addition of integers.
template <int kCount>
FASTNET_INLINE void exp_each(Vec<float> (&x)[kCount]) {
  using V = Vec<float>;
#if defined(__x86_64__)
  if constexpr (kVectorBytes == 64) {
    exp_each_of_16(x);
    return;
  }
#endif
  constexpr float kRounds = 12582912.0f + 127.0f;
  V shifted[kCount], r[kCount], q[kCount];
  FASTNET_UNROLL for (int i = 0; i < kCount; ++i) x[i] = maximum<float>(x[i], splat(-88.0f));
  FASTNET_UNROLL for (int i = 0; i < kCount; ++i) shifted[i] = x[i] * 1.44269504f + kRounds;
  FASTNET_UNROLL for (int i = 0; i < kCount; ++i) {
    const V n = shifted[i] - kRounds;
    r[i] = (x[i] - n * 0.693359375f) + n * 2.12194440e-4f;
  }
  // exp(r) = 1 + r + r² q(r), q the polynomial of least relative error (3e-9)
  FASTNET_UNROLL for (int i = 0; i < kCount; ++i) {
    q[i] = r[i] * 1.381459878757596e-3f + 8.368716575205326e-3f;
  }
  FASTNET_UNROLL for (int i = 0; i < kCount; ++i) q[i] = q[i] * r[i] + 4.166838899254799e-2f;
  FASTNET_UNROLL for (int i = 0; i < kCount; ++i) q[i] = q[i] * r[i] + 1.666652113199234e-1f;
  FASTNET_UNROLL for (int i = 0; i < kCount; ++i) q[i] = q[i] * r[i] + 4.999999403953552e-1f;
  FASTNET_UNROLL for (int i = 0; i < kCount; ++i) q[i] = q[i] * r[i] + 1.0f;
  FASTNET_UNROLL for (int i = 0; i < kCount; ++i) {
    x[i] = (q[i] * r[i] + 1.0f) * (V)((Vec<uint32_t>)shifted[i] << 23);
  }
}

FASTNET_INLINE Vec<float> exp(Vec<float> x) {
  Vec<float> one[1] = {x};
  exp_each(one);
  return one[0];
}

FASTNET_INLINE Vec<double> exp(Vec<double> x) {
  const Vec<double> shifted = x * 1.4426950408889634 + 6755399441055744.0;
  const Vec<double> n = shifted - 6755399441055744.0;
  const Vec<double> r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
  // The Taylor series up to r¹³ / 13!, whose rest is below 4e-18.
  constexpr double kInverseFactorials[] = {1 / 6227020800.0,
                                           1 / 479001600.0,
                                           1 / 39916800.0,
                                           1 / 3628800.0,
                                           1 / 362880.0,
                                           1 / 40320.0,
                                           1 / 5040.0,
                                           1 / 720.0,
                                           1 / 120.0,
                                           1 / 24.0,
                                           1 / 6.0,
                                           1 / 2.0,
                                           1.0,
                                           1.0};
  Vec<double> sum = splat(kInverseFactorials[0]);
#pragma GCC unroll 13
  for (int k = 1; k < 14; ++k) sum = sum * r + kInverseFactorials[k];
  const Vec<double> power = (Vec<double>)(((Vec<uint64_t>)shifted << 52) + 0x3ff0000000000000u);
  return x < -708.396418532264 ? Vec<double>{} : sum * power;
}

template <int kCount>
FASTNET_INLINE void exp_each(Vec<double> (&x)[kCount]) {
  for (int i = 0; i < kCount; ++i) x[i] = exp(x[i]);
}

// ---------------------------------------------------------------------------------------------
// log(x), to 2 ulp, for x = 0, normal x > 0 and NaN.
//
// x = 2^n · m with m in [√½, √2), and log m = 2 artanh(s) = 2 (s + s³/3 + s⁵/5 + ...) with
// s = (m - 1) / (m + 1), |s| < 0.172.

template <class A, class Bits, int kTerms>
FASTNET_INLINE Vec<A> log_by_series(Vec<A> x, Bits bits_of_sqrt_half, int digits, A ln2_high,
                                    A ln2_low) {
  const Vec<Bits> exponent = ((Vec<Bits>)x - bits_of_sqrt_half) >> digits;
  const Vec<A> m = (Vec<A>)((Vec<Bits>)x - (exponent << digits));
  const Vec<A> n = __builtin_convertvector(exponent, Vec<A>);
  const Vec<A> s = (m - A(1)) / (m + A(1)), square = s * s;
  Vec<A> series = splat(A(2) / (2 * kTerms + 1));
#pragma GCC unroll 12
  for (int k = kTerms - 1; k > 0; --k) series = series * square + A(2) / (2 * k + 1);
  const Vec<A> log_m = (series * square) * s + A(2) * s;
  const Vec<A> result = n * ln2_high + (n * ln2_low + log_m);
  const Vec<A> infinite = splat(static_cast<A>(-__builtin_huge_val()));
  return x > Vec<A>{} ? result : (x == Vec<A>{} ? infinite : x);
}

FASTNET_INLINE Vec<float> log(Vec<float> x) {
  return log_by_series<float, int32_t, 4>(x, 0x3f3504f3, 23, 0.693359375f, -2.12194440e-4f);
}
FASTNET_INLINE Vec<double> log(Vec<double> x) {
  return log_by_series<double, int64_t, 11>(x, 0x3fe6a09e667f3bcd, 52, 0.693147180369123816490,
                                            1.90821492927058770002e-10);
}
