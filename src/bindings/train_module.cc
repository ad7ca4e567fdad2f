// coterie._train: the trainer for Python, with plain types only. Import torch first, so that its
// libraries are loaded. Computation runs with the GIL released.
#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/library.h>

#include <nlohmann/json.hpp>

#include "base/machine.h"
#include "bindings/errors.h"
#include "bindings/process_group_binding.h"
#include "io/safetensors.h"
#include "model/config.h"
#include "train/checkpoint.h"
#include "train/expert_parallel_json.h"
#include "train/memory_plan.h"
#include "train/module_optimizer.h"
#include "train/packed_weights.h"
#include "train/torch_process_group.h"
#include "train/trainer.h"
#include "train/verify.h"

// Python's tensor and ours are the same one: its memory, its gradient and its hooks.
namespace nanobind::detail {
template <>
struct type_caster<at::Tensor> {
  NB_TYPE_CASTER(at::Tensor, const_name("torch.Tensor"))

  bool from_python(handle source, uint8_t /*flags*/, cleanup_list* /*cleanup*/) noexcept {
    if (!THPVariable_Check(source.ptr())) return false;
    value = THPVariable_Unpack(source.ptr());
    return true;
  }
};
}  // namespace nanobind::detail

namespace nb = nanobind;
using namespace nb::literals;

namespace coterie {
namespace {

using Tokens = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// A numpy array that keeps the tensor's memory alive.
template <typename T>
nb::ndarray<nb::numpy, T> to_numpy(const at::Tensor& tensor) {
  auto* owner = new at::Tensor(tensor.contiguous());
  nb::capsule capsule(owner, [](void* p) noexcept { delete static_cast<at::Tensor*>(p); });
  const std::vector<size_t> shape(owner->sizes().begin(), owner->sizes().end());
  return nb::ndarray<nb::numpy, T>(owner->mutable_data_ptr(), shape.size(), shape.data(), capsule);
}

at::Tensor from_numpy(const Tokens& tokens) {
  const auto rows = static_cast<int64_t>(tokens.shape(0)), cols = static_cast<int64_t>(tokens.shape(1));
  return at::from_blob(const_cast<int32_t*>(tokens.data()), {rows, cols}, at::kInt).to(at::kLong);
}

nb::dict to_dict(const LoadStats& load) {
  nb::dict d;
  d["tokens_per_expert"] = load.tokens_per_expert_E;
  d["entropy"] = load.entropy;
  d["max_violation"] = load.max_violation;
  d["dropped"] = load.dropped;
  d["dead_experts"] = load.dead_experts;
  return d;
}

nb::dict to_dict(const StepMetrics& m) {
  nb::dict d;
  d["step"] = m.step;
  d["tokens"] = m.tokens;
  d["loss"] = m.loss;
  d["balance_loss"] = m.balance_loss;
  d["kl_loss"] = m.kl_loss;
  d["grad_norm"] = m.grad_norm;
  d["learning_rate"] = m.learning_rate;
  d["seconds"] = m.seconds;
  d["dropped"] = m.dropped;
  nb::list expert_balance, layers;
  for (const LoadStats& load : m.loads) {
    expert_balance.append(load.balance);
    layers.append(to_dict(load));
  }
  d["expert_balance"] = expert_balance;
  d["moe_layers"] = layers;
  return d;
}

// The LanguageModel alone, for tests and for looking inside.
class Model {
 public:
  Model(const std::string& config_json, const std::string& dtype, uint64_t seed)
      : model_(ModelConfig::from_json(config_json, "model"), parameter_type(dtype), seed) {}

  void load(const std::string& path) { model_.load(SafetensorsSource(path)); }

  nb::dict parameters() const {
    nb::dict d;
    for (const Parameter& p : model_.parameters())
      d[p.name.c_str()] = to_numpy<float>(p.tensor.detach().to(at::kFloat, false, true));
    return d;
  }

  // Losses of a training forward pass, and the gradient of ce + balance_loss * balance + z_loss * z.
  nb::tuple loss_and_gradients(const Tokens& tokens, double balance_loss, double z_loss, uint64_t seed, uint64_t step,
                               const std::string& balance_loss_choices) {
    const at::Tensor windows = from_numpy(tokens);
    nb::dict losses, gradients;
    const at::Tensor inputs = windows.narrow(1, 0, windows.size(1) - 1).contiguous();
    const at::Tensor targets = windows.narrow(1, 1, windows.size(1) - 1).reshape({-1});
    const ForwardResult result =
        model_.forward(inputs, {.training = true,
                                .seed = seed,
                                .step = step,
                                .balance_choices = balance_choices_from_name(balance_loss_choices)});
    const HeadLoss head = head_loss(result.hidden_TD, model_.head(), targets, nullptr);
    at::Tensor loss = head.loss;
    losses["loss"] = head.cross_entropy;
    if (result.balance_loss.defined()) {
      loss = loss + balance_loss * result.balance_loss;
      losses["balance_loss"] = result.balance_loss.item<double>();
    }
    if (result.z_loss.defined()) {
      loss = loss + z_loss * result.z_loss;
      losses["z_loss"] = result.z_loss.item<double>();
    }
    {
      nb::gil_scoped_release release;  // torch's autograd refuses to run under it
      loss.backward();
    }
    for (const Parameter& p : model_.parameters()) {
      at::Tensor& grad = p.tensor.mutable_grad();
      if (grad.defined()) gradients[p.name.c_str()] = to_numpy<float>(grad.to(at::kFloat));
      grad.reset();
    }
    return nb::make_tuple(losses, gradients);
  }

  nb::ndarray<nb::numpy, float> logits(const Tokens& tokens) const {
    c10::NoGradGuard no_grad;
    const at::Tensor inputs = from_numpy(tokens);
    const at::Tensor hidden = model_.forward(inputs, {.training = false}).hidden_TD;
    const at::Tensor logits = linear(hidden, model_.head(), at::Tensor());
    return to_numpy<float>(logits.view({inputs.size(0), inputs.size(1), -1}));
  }

  // The choices of every MoE layer [T, K], dropped ones too.
  std::vector<nb::ndarray<nb::numpy, int32_t>> expert_ids(const Tokens& tokens, bool training, uint64_t seed,
                                                          uint64_t step) const {
    c10::NoGradGuard no_grad;
    std::vector<nb::ndarray<nb::numpy, int32_t>> out;
    const ForwardOptions options{.training = training, .seed = seed, .step = step};
    for (const auto& routing : model_.forward(from_numpy(tokens), options).routings) {
      const at::Tensor ids = at::empty({routing->num_tokens, routing->top_k}, at::kInt);
      std::copy(routing->expert_ids_TK.begin(), routing->expert_ids_TK.end(), ids.mutable_data_ptr<int32_t>());
      out.push_back(to_numpy<int32_t>(ids));
    }
    return out;
  }

 private:
  LanguageModel model_;
};

void bind_module_optimizer(nb::module_& m) {
  using Unlocked = nb::call_guard<nb::gil_scoped_release>;
  nb::class_<Parameter>(m, "Parameter")
      .def(
          "__init__",
          [](Parameter* self, const std::string& name, const at::Tensor& tensor, int64_t first_row,
             int64_t logical_rows, ProcessGroup* replicas) {
            new (self) Parameter(part_in_rows(name, tensor, first_row, logical_rows, replicas));
          },
          "name"_a, "tensor"_a, "first_row"_a = 0, "logical_rows"_a = 0, "replicas"_a.none() = nb::none());
  nb::class_<AdamWSettings>(m, "AdamWSettings")
      .def(
          "__init__",
          [](AdamWSettings* self, double learning_rate, double beta1, double beta2, double eps, double weight_decay,
             bool decoupled) { new (self) AdamWSettings{learning_rate, beta1, beta2, eps, weight_decay, decoupled}; },
          "learning_rate"_a, "beta1"_a, "beta2"_a, "eps"_a, "weight_decay"_a, "decoupled"_a);
  // Whoever makes one keeps the groups of ranks alive.
  nb::class_<ModuleOptimizer>(m, "ModuleOptimizer")
      .def(
          "__init__",
          [](ModuleOptimizer* self, std::vector<Parameter> parameters, int64_t gradient_accumulation_steps,
             int64_t zero_stage, int64_t reduce_bucket_size, const std::string& offload_path, ProcessGroup* world) {
            const ParallelSettings parallel{.zero_stage = zero_stage,
                                            .reduce_bucket_size = reduce_bucket_size,
                                            .states = {.offload_path = offload_path}};
            new (self) ModuleOptimizer(std::move(parameters), gradient_accumulation_steps, parallel, world);
          },
          "parameters"_a, "gradient_accumulation_steps"_a, "zero_stage"_a, "reduce_bucket_size"_a, "offload_path"_a,
          "world"_a.none())
      .def("accumulate_gradients", &ModuleOptimizer::accumulate_gradients, Unlocked())
      .def("step", &ModuleOptimizer::step, "settings"_a, "max_grad_norm"_a, "skips_overflow"_a, Unlocked())
      .def_prop_rw("num_steps", &ModuleOptimizer::num_steps, &ModuleOptimizer::set_num_steps)
      .def("write_shard", &ModuleOptimizer::write_shard, "directory"_a, "name"_a, Unlocked())
      .def("load", &ModuleOptimizer::load, "path"_a, "moments"_a, Unlocked());
  nb::class_<CheckpointDirectory>(m, "CheckpointDirectory")
      .def(nb::init<std::string>(), "path"_a)
      .def("latest", &CheckpointDirectory::latest)
      .def("begin", &CheckpointDirectory::begin, "name"_a)
      .def(
          "commit",
          [](const CheckpointDirectory& self, const std::string& name, int num_ranks, const std::string& state_json,
             bool latest) {
            return self.commit(name, {.num_ranks = num_ranks,
                                      .state = nlohmann::json::parse(state_json),
                                      .keep = 0,
                                      .replace = true,
                                      .latest = latest});
          },
          "name"_a, "num_ranks"_a, "state_json"_a, "latest"_a, Unlocked());
}

nb::dict step(Trainer& trainer) {
  StepMetrics metrics;
  {
    nb::gil_scoped_release release;
    metrics = trainer.step();
  }
  return to_dict(metrics);
}

nb::dict to_dict(const WorstTensor& worst, double tolerance) {
  nb::dict d;
  d["tensor"] = worst.tensor;
  d["error"] = worst.error;
  d["tolerance"] = tolerance;
  return d;
}

nb::dict verify(const std::string& model_config_json, const std::string& settings_json, ProcessGroup& world) {
  const ModelConfig config = ModelConfig::from_json(model_config_json, "model");
  const RunSettings settings = RunSettings::from_json(settings_json);
  VerifyReport report;
  {
    nb::gil_scoped_release release;
    report = verify_step(config, settings, world);
  }
  const VerifyTolerance tolerance = VerifyTolerance::of(settings.train.dtype);
  nb::dict d;
  d["loss"] = to_dict({"", report.loss}, tolerance.loss);
  d["gradient"] = to_dict(report.gradient, tolerance.gradient);
  d["norm"] = to_dict({"", report.norm}, tolerance.norm);
  d["weight"] = to_dict(report.weight, tolerance.weight);
  d["uncounted"] = to_dict(report.uncounted, 0);
  d["passed"] = within(report, tolerance);
  return d;
}

nb::dict evaluate(const Trainer& trainer) {
  EvalMetrics metrics;
  {
    nb::gil_scoped_release release;
    metrics = trainer.evaluate();
  }
  nb::dict d;
  d["step"] = trainer.state().step;
  d["eval_tokens"] = metrics.tokens;
  d["loss"] = metrics.loss;
  d["loss_per_byte"] = metrics.loss_per_byte;
  return d;
}

MemoryCase memory_case(const std::string& config_json, const std::string& dtype, int64_t ranks,
                       const std::string& expert_parallel, int64_t reduce_bucket_size, int64_t passes) {
  MemoryCase layout{.config = ModelConfig::from_json(config_json, "model"),
                    .dtype = dtype_from_name(dtype),
                    .num_ranks = ranks,
                    .passes = passes};
  layout.parallel.experts.expert_parallel = expert_parallel_from_json(expert_parallel);
  layout.parallel.reduce_bucket_size = reduce_bucket_size;
  return layout;
}

nb::list to_list(const std::vector<TrainingBytes>& ranks) {
  nb::list list;
  for (const TrainingBytes& bytes : ranks) {
    nb::dict d;
    d["weights"] = bytes.weights;
    d["gradients"] = bytes.gradients;
    d["masters"] = bytes.masters;
    d["moments"] = bytes.moments;
    list.append(d);
  }
  return list;
}

nb::list plan_at_stage(const MemoryCase& layout, int64_t stage) {
  MemoryCase at_stage = layout;
  at_stage.parallel.zero_stage = stage;
  std::vector<TrainingBytes> ranks;
  {
    nb::gil_scoped_release release;
    ranks = plan_memory(at_stage);
  }
  return to_list(ranks);
}

nb::list measure_stages(const MemoryCase& layout, const std::vector<int64_t>& stages) {
  std::vector<std::vector<TrainingBytes>> measured;
  {
    nb::gil_scoped_release release;
    measured = measure_memory(layout, stages);
  }
  nb::list list;
  for (const std::vector<TrainingBytes>& ranks : measured) list.append(to_list(ranks));
  return list;
}

}  // namespace
}  // namespace coterie

NB_MODULE(_train, m) {
  using namespace coterie;
  register_exceptions(m);
  bind_process_group(m);
  m.def("torch_process_group", &torch_process_group, "name"_a, "timeout_s"_a);
  m.def("keep_packed_weights", &keep_packed_weights, "max_bytes"_a, nb::call_guard<nb::gil_scoped_release>());
  m.def("packed_weight_bytes", &packed_weight_bytes, nb::call_guard<nb::gil_scoped_release>());
  m.def("unused_memory", [] { return unused_memory(); });
  m.def("verify", &verify, "model_config_json"_a, "settings_json"_a, "world"_a);
  bind_module_optimizer(m);
  nb::class_<Trainer>(m, "Trainer")
      .def(
          "__init__",
          [](Trainer* self, const std::string& model_config_json, const std::string& settings_json,
             ProcessGroup* world) {
            new (self) Trainer(ModelConfig::from_json(model_config_json, "model"),
                               RunSettings::from_json(settings_json), world);
          },
          "model_config_json"_a, "settings_json"_a, "world"_a.none() = nb::none(), nb::keep_alive<1, 4>())
      .def("resume", &Trainer::resume, nb::call_guard<nb::gil_scoped_release>())
      .def("step", &step)
      .def("evaluate", &evaluate)
      .def("start_save", &Trainer::save, nb::call_guard<nb::gil_scoped_release>())
      .def("finish_save", &Trainer::finish_save, nb::call_guard<nb::gil_scoped_release>())
      .def("export", &Trainer::export_model, "directory"_a, nb::call_guard<nb::gil_scoped_release>())
      .def_prop_ro("finished", &Trainer::finished)
      .def_prop_ro("step_index", [](const Trainer& t) { return t.state().step; })
      .def_prop_ro("total_steps", &Trainer::total_steps)
      .def_prop_ro("train_seconds", [](const Trainer& t) { return t.state().train_seconds; });
  nb::class_<Model>(m, "Model")
      .def(nb::init<const std::string&, const std::string&, uint64_t>(), "model_config_json"_a, "dtype"_a = "fp32",
           "seed"_a = 0)
      .def("load", &Model::load, "path"_a)
      .def("parameters", &Model::parameters)
      .def("loss_and_gradients", &Model::loss_and_gradients, "tokens"_a, "balance_loss"_a = 0.01, "z_loss"_a = 0.0,
           "seed"_a = 0, "step"_a = 0, "balance_loss_choices"_a = "all")
      .def("logits", &Model::logits, "tokens"_a)
      .def("expert_ids", &Model::expert_ids, "tokens"_a, "training"_a = false, "seed"_a = 0, "step"_a = 0);
  nb::class_<MemoryCase>(m, "MemoryCase")
      .def(nb::new_(&memory_case), "config_json"_a, "dtype"_a, "ranks"_a, "expert_parallel"_a, "reduce_bucket_size"_a,
           "passes"_a)
      .def("degrees",
           [](const MemoryCase& c) { return expert_parallel_degrees(c.parallel.experts, c.config, c.num_ranks); })
      .def("plan", &plan_at_stage, "stage"_a)
      .def("measure", &measure_stages, "stages"_a);
}
