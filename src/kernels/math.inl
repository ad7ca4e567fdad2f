// exp, the logistic function and the normal distribution, to a few units in the last place of fp32
// (polynomials fitted by iteratively reweighted least squares to the least maximal relative error).

// Truncates: 0 below -87.3 (where the result would be denormal), infinity above 88.7; NaN stays NaN.
COTERIE_INLINE VF exp(VF x) {
  constexpr float kLowest = -87.3365f, kHighest = 88.7228f;
  const VF clamped = x < kLowest ? broadcast(kLowest) : (x > kHighest ? broadcast(kHighest) : x);
  // x = n ln2 + r with |r| <= ln2 / 2; adding 1.5 * 2^23 rounds to an integer. ln2 is split so that
  // n * 0.693359375 is exact.
  constexpr float kRounder = 12582912.0f;
  const VF shifted = fma(clamped, broadcast(1.44269504f), broadcast(kRounder));
  const VF n = shifted - kRounder;
  VF r = fma(n, broadcast(-0.693359375f), clamped);
  r = fma(n, broadcast(2.12194440e-4f), r);
  // Error of the polynomial below 4e-9.
  VF p = broadcast(0.00138146128f);
  p = fma(p, r, broadcast(0.00836871006f));
  p = fma(p, r, broadcast(0.041668389f));
  p = fma(p, r, broadcast(0.166665211f));
  p = fma(p, r, broadcast(0.49999994f));
  p = fma(p, r * r, r) + 1.0f;
  const VF result = times_power(p, n);
  const VF high = x > kHighest ? broadcast(std::numeric_limits<float>::infinity()) : result;
  return x < kLowest ? VF{} : high;
}

COTERIE_INLINE VF logistic(VF x) { return reciprocal(1.0f + exp(-x)); }

// Phi(x), the standard normal distribution, and its density. Phi(-|x|) = exp(-x^2/2) * erfcx(z) / 2 with
// z = |x|/sqrt(2), and erfcx(z) * (1 + 2z) is a polynomial in (z - 3) / (z + 3) to 7e-8 for z up to
// 10.2, beyond which exp(-z^2) is 0.
struct Normal {
  VF distribution, density;
};
COTERIE_INLINE Normal normal(VF x) {
  const VF magnitude = x < 0.0f ? -x : x;
  const VF scaled = magnitude * 0.707106781f;
  const VF z = scaled > 12.0f ? broadcast(12.0f) : scaled;
  const VF bell = exp(x * x * -0.5f);
  const VF z3 = z + 3.0f, z21 = fma(z, broadcast(2.0f), broadcast(1.0f));
  const VF inverse = reciprocal(z3 * z21);  // one serves both quotients
  const VF t = (z - 3.0f) * z21 * inverse;
  VF p = broadcast(0.00253931736f);
  p = fma(p, t, broadcast(0.00225483882f));
  p = fma(p, t, broadcast(-0.0242116731f));
  p = fma(p, t, broadcast(0.0682996735f));
  p = fma(p, t, broadcast(-0.11918015f));
  p = fma(p, t, broadcast(0.129653692f));
  p = fma(p, t, broadcast(-0.0475689992f));
  p = fma(p, t, broadcast(-0.135621518f));
  p = fma(p, t, broadcast(1.25300813f));
  const VF tail = bell * 0.5f * p * z3 * inverse;
  return {x < 0.0f ? tail : 1.0f - tail, bell * 0.398942280f};
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
