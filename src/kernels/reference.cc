#include "kernels/reference.h"

#include <cmath>
#include <vector>

namespace coterie::reference {
namespace {

double as_type(double value, DType dtype) {
  return dtype == DType::kBF16 ? to_float(to_bfloat16(static_cast<float>(value))) : value;
}

// Element i of a key or a value.
double load_kv(const PagedKv& kv, const AttentionShape& shape, bool value, int64_t position, int64_t g, int64_t i) {
  const KvBlock block(kv.dtype, kv.block_size, shape.G, shape.d, kv.has_values ? shape.v : 0);
  const auto* const bytes = static_cast<const char*>(kv.blocks[position / kv.block_size]);
  const bool own = value && kv.has_values;
  const int64_t row = position % kv.block_size;
  const char* const rows = bytes + (own ? block.values(g) : block.keys(g));
  const int64_t dim = own ? shape.v : shape.d;
  if (kv.dtype != DType::kI8) return load(row_major(static_cast<const void*>(rows), kv.dtype, row + 1, dim), row, i);
  const auto* const factors =
      reinterpret_cast<const float*>(bytes + (own ? block.value_factors(g) : block.key_factors(g)));
  return static_cast<float>(reinterpret_cast<const int8_t*>(rows)[row * dim + i]) * factors[row];
}

struct Sum {
  double value = 0, absolute = 0;
};

Sum product(const GemmProblem& p, int64_t m, int64_t n) {
  const int64_t row = p.gather_M ? p.gather_M[m] : m;
  Sum sum;
  for (int64_t k = 0; k < p.K(); ++k) {
    const double a = as_type(load(p.a, row, p.a_gather_K ? p.a_gather_K[k] : k), p.b.dtype);
    const double term = a * load(p.b, n, p.b_gather_K ? p.b_gather_K[k] : k);
    sum.value += term;
    sum.absolute += std::abs(term);
  }
  if (p.bias_N) sum.value += p.bias_N[n];
  if (p.bias_N) sum.absolute += std::abs(p.bias_N[n]);
  return sum;
}

}  // namespace

double load(const ConstMatrix& m, int64_t row, int64_t col) {
  const int64_t at = row * m.row_stride + col * m.col_stride;
  if (m.dtype == DType::kBF16) return to_float(static_cast<const BFloat16*>(m.data)[at]);
  return static_cast<const float*>(m.data)[at];
}

double activation_value(Activation activation, double x) {
  switch (activation) {
    case Activation::kRelu:
      return x > 0 ? x : 0;
    case Activation::kGelu:
      return x * 0.5 * std::erfc(-x / std::sqrt(2.0));
    case Activation::kGeluTanh: {
      const double u = std::sqrt(2.0 / M_PI) * (x + 0.044715 * x * x * x);
      return x / (1 + std::exp(-2 * u));
    }
    case Activation::kSilu:
      return x / (1 + std::exp(-x));
    case Activation::kClampedSwiglu: {
      const double gate = std::min(x, double{kSwigluLimit});
      return gate / (1 + std::exp(-double{kSwigluAlpha} * gate));
    }
    case Activation::kNone:
      break;
  }
  return x;
}

double gated_factor(Activation activation, double up) {
  if (activation != Activation::kClampedSwiglu) return up;
  return std::clamp(up, -double{kSwigluLimit}, double{kSwigluLimit}) + 1;
}

double activation_derivative(Activation activation, double x) {
  switch (activation) {
    case Activation::kRelu:
      return x > 0 ? 1 : 0;
    case Activation::kGelu:
      return 0.5 * std::erfc(-x / std::sqrt(2.0)) + x * std::exp(-x * x / 2) / std::sqrt(2 * M_PI);
    case Activation::kGeluTanh: {
      const double u = std::sqrt(2.0 / M_PI) * (x + 0.044715 * x * x * x);
      const double slope = std::sqrt(2.0 / M_PI) * (1 + 3 * 0.044715 * x * x);
      const double s = 1 / (1 + std::exp(-2 * u));
      return s + x * 2 * s * (1 - s) * slope;
    }
    case Activation::kSilu: {
      const double s = 1 / (1 + std::exp(-x));
      return s + x * s * (1 - s);
    }
    case Activation::kClampedSwiglu:  // not trained
    case Activation::kNone:
      break;
  }
  return 1;
}

void gemm(const GemmProblem& p, double* c_MN, double* sum_of_abs_MN) {
  const int64_t M = p.c.rows, N = p.c.cols;
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t n = 0; n < N; ++n) {
      const Sum sum = product(p, m, n), up = p.gated ? product(p, m, N + n) : Sum{};
      double value = activation_value(p.activation, sum.value);
      if (p.gated) value *= gated_factor(p.activation, up.value);
      if (p.accumulate) value += load(p.c, m, n);
      c_MN[m * N + n] = value;
      if (sum_of_abs_MN) sum_of_abs_MN[m * N + n] = sum.absolute + up.absolute;
    }
  }
}

void rms_norm(const float* x_TD, const float* weight_D, float eps, int64_t T, int64_t D, double* out_TD) {
  for (int64_t t = 0; t < T; ++t) {
    double squares = 0;
    for (int64_t i = 0; i < D; ++i) squares += double{x_TD[t * D + i]} * x_TD[t * D + i];
    for (int64_t i = 0; i < D; ++i) {
      out_TD[t * D + i] = x_TD[t * D + i] / std::sqrt(squares / static_cast<double>(D) + eps) * weight_D[i];
    }
  }
}

void layer_norm(const float* x_TD, const float* weight_D, const float* bias_D, float eps, int64_t T, int64_t D,
                double* out_TD) {
  for (int64_t t = 0; t < T; ++t) {
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < D; ++i) sum += x_TD[t * D + i];
    const double mean = sum / static_cast<double>(D);
    for (int64_t i = 0; i < D; ++i) squares += (x_TD[t * D + i] - mean) * (x_TD[t * D + i] - mean);
    for (int64_t i = 0; i < D; ++i) {
      const double scaled = (x_TD[t * D + i] - mean) / std::sqrt(squares / static_cast<double>(D) + eps) * weight_D[i];
      out_TD[t * D + i] = scaled + (bias_D ? bias_D[i] : 0);
    }
  }
}

void rope(const RopeHeads& heads, const int32_t* positions_T, const float* inverse_frequency) {
  const int64_t half = heads.rotary_dim / 2;
  for (int64_t t = 0; t < heads.T; ++t) {
    for (int64_t h = 0; h < heads.num_heads; ++h) {
      float* head = heads.x + t * heads.token_stride + h * heads.head_stride;
      const std::vector<float> before(head, head + heads.rotary_dim);
      for (int64_t i = 0; i < half; ++i) {
        const double angle = static_cast<float>(positions_T[t]) * inverse_frequency[i];  // fp32, see rope.cc
        const double a = before[heads.interleaved ? 2 * i : i], b = before[heads.interleaved ? 2 * i + 1 : i + half];
        head[i] = static_cast<float>(a * std::cos(angle) - b * std::sin(angle));
        head[i + half] = static_cast<float>(b * std::cos(angle) + a * std::sin(angle));
      }
    }
  }
}

void attention(const float* q_THd, const PagedKv& kv, int64_t T, int64_t S, const AttentionShape& shape,
               double* out_THv) {
  const int64_t H = shape.H, d = shape.d, v = shape.v;
  std::vector<double> p(static_cast<size_t>(S));
  for (int64_t t = 0; t < T; ++t) {
    const int64_t end = S - T + t + 1, first = shape.window > 0 ? std::max<int64_t>(0, end - shape.window) : 0;
    for (int64_t h = 0; h < H; ++h) {
      const int64_t g = h / (H / shape.G);
      const float* query = q_THd + (t * H + h) * d;
      double maximum = shape.sinks_H ? shape.sinks_H[h] : -INFINITY;
      for (int64_t j = first; j < end; ++j) {
        p[j] = 0;
        for (int64_t i = 0; i < d; ++i) p[j] += shape.scale * query[i] * load_kv(kv, shape, false, j, g, i);
        maximum = std::max(maximum, p[j]);
      }
      double sum = shape.sinks_H ? std::exp(shape.sinks_H[h] - maximum) : 0;
      for (int64_t j = first; j < end; ++j) sum += p[j] = std::exp(p[j] - maximum);
      for (int64_t i = 0; i < v; ++i) {
        double& out = out_THv[(t * H + h) * v + i] = 0;
        for (int64_t j = first; j < end; ++j) {
          out += p[j] / sum * load_kv(kv, shape, true, j, g, i);
        }
      }
    }
  }
}

}  // namespace coterie::reference
