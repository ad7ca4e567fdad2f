// exp, the logistic function and the normal distribution, to a few units in the last place of fp32
// (polynomials fitted by iteratively reweighted least squares to the least maximal relative error).

constexpr float kLowestExponent = -87.3365f;  // below, the result would be denormal

// For x from there to 88.7; NaN stays NaN.
COTERIE_INLINE VF exp_within_range(VF x) {
  // x = n ln2 + r with |r| <= ln2 / 2; adding 1.5 * 2^23 rounds to an integer. ln2 is split so that
  // n * 0.693359375 is exact.
  constexpr float kRounder = 12582912.0f;
  const VF n = fma(x, broadcast(1.44269504f), broadcast(kRounder)) - kRounder;
  VF r = fma(n, broadcast(-0.693359375f), x);
  r = fma(n, broadcast(2.12194440e-4f), r);
  // Error of the polynomial below 4e-9.
  VF p = broadcast(0.00138146128f);
  p = fma(p, r, broadcast(0.00836871006f));
  p = fma(p, r, broadcast(0.041668389f));
  p = fma(p, r, broadcast(0.166665211f));
  p = fma(p, r, broadcast(0.49999994f));
  p = fma(p, r * r, r) + 1.0f;
  return times_power(p, n);
}

// Truncates: 0 below that range, infinity above.
COTERIE_INLINE VF exp(VF x) {
  constexpr float kHighest = 88.7228f;
  const VF result =
      exp_within_range(x < kLowestExponent ? broadcast(kLowestExponent) : (x > kHighest ? broadcast(kHighest) : x));
  const VF high = x > kHighest ? broadcast(std::numeric_limits<float>::infinity()) : result;
  return x < kLowestExponent ? VF{} : high;
}

// For x that is above 0 by rounding errors at most; far above, anything.
COTERIE_INLINE VF exp_up_to_zero(VF x) {
  const VF result = exp_within_range(x < kLowestExponent ? broadcast(kLowestExponent) : x);
  return x < kLowestExponent ? VF{} : result;
}

COTERIE_INLINE VF logistic(VF x) { return reciprocal(1.0f + exp(-x)); }

// Phi(x), the standard normal distribution, and its density. With m = |x| = sqrt(2) z, Phi(-m) = exp(-z^2) * erfcx(z) /
// 2, and erfcx(z) * (1 + 2z) is a polynomial in t = (z - 3) / (z + 3) to 7e-8 for z up to 10.2. Both are 0 where
// exp(-z^2) would be denormal, from m = 13.2 on.
struct Normal {
  VF distribution, density;
};
COTERIE_INLINE Normal normal(VF x) {
  constexpr float kFar = 13.2f, kRoot2 = 1.41421356f;
  const VF distance = magnitude(x), m = distance > kFar ? broadcast(kFar) : distance;
  const VF near_bell = exp_within_range(m * m * -0.5f), bell = distance > kFar ? VF{} : near_bell;
  const VF m3 = m + 3.0f * kRoot2, z21 = fma(m, broadcast(kRoot2), broadcast(1.0f));
  const VF inverse = reciprocal(m3 * z21);  // one serves both quotients
  const VF t = (m - 3.0f * kRoot2) * (z21 * inverse);
  VF p = broadcast(0.00126965868f);
  p = fma(p, t, broadcast(0.00112741943f));
  p = fma(p, t, broadcast(-0.0121058365f));
  p = fma(p, t, broadcast(0.0341498367f));
  p = fma(p, t, broadcast(-0.059590075f));
  p = fma(p, t, broadcast(0.0648268462f));
  p = fma(p, t, broadcast(-0.0237844996f));
  p = fma(p, t, broadcast(-0.067810759f));
  p = fma(p, t, broadcast(0.626504065f));
  const VF tail = bell * (p * (m3 * inverse));
  return {x >= 0.0f ? 1.0f - tail : tail, bell * 0.398942280f};
}

// Value and derivative of an activation function.
struct Activated {
  VF value, slope;
};
constexpr float kTanhGeluScale = 1.59576912f;  // 2 sqrt(2/pi)
constexpr float kTanhGeluCubic = 0.044715f;

COTERIE_INLINE Activated activated(Activation activation, VF x) {
  const VF one = broadcast(1.0f);
  switch (activation) {
    case Activation::kRelu:
      return {x < 0.0f ? VF{} : x, x > 0.0f ? one : VF{}};
    case Activation::kGelu: {
      const Normal n = normal(x);
      return {x * n.distribution, fma(x, n.density, n.distribution)};
    }
    case Activation::kGeluTanh: {  // (1 + tanh(u)) / 2 = logistic(2u): no cancellation for negative x
      const VF low = x < -100.0f ? broadcast(-100.0f) : x, near = low > 100.0f ? broadcast(100.0f) : low;
      const VF s = logistic(near * kTanhGeluScale * fma(near * near, broadcast(kTanhGeluCubic), one));
      const VF inner_slope = kTanhGeluScale * fma(near * near, broadcast(3.0f * kTanhGeluCubic), one);
      return {x * s, s + near * s * (1.0f - s) * inner_slope};
    }
    case Activation::kSilu: {
      const VF s = logistic(x);
      return {x * s, s + x * s * (1.0f - s)};
    }
    case Activation::kClampedSwiglu: {  // not trained
      const VF gate = x > kSwigluLimit ? broadcast(kSwigluLimit) : x;
      return {gate * logistic(gate * kSwigluAlpha), one};
    }
    case Activation::kNone:
      break;
  }
  return {x, one};
}

// What the activated gate is multiplied by.
COTERIE_INLINE VF gated_factor(Activation activation, VF up) {
  if (activation != Activation::kClampedSwiglu) return up;
  const VF low = up < -kSwigluLimit ? broadcast(-kSwigluLimit) : up;
  return (low > kSwigluLimit ? broadcast(kSwigluLimit) : low) + 1.0f;
}
