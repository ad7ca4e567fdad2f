#include "train/distiller.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <map>
#include <vector>

#include "coterie/error.h"
#include "io/safetensors.h"

namespace coterie {
namespace {

LanguageModel load_teacher(const std::string& directory, at::ScalarType dtype) {
  LanguageModel model(ModelConfig::from_file(directory + "/config.json"), dtype, /*seed=*/0);
  model.load(SafetensorsSource(directory));
  return model;
}

// The teacher's layers that stay, in order.
std::vector<int64_t> kept_layers(int64_t num_layers, const std::vector<int64_t>& dropped) {
  std::vector<int64_t> kept;
  for (int64_t i = 0; i < num_layers; ++i) {
    if (std::find(dropped.begin(), dropped.end(), i) == dropped.end()) kept.push_back(i);
  }
  return kept;
}

// "model.layers.3.router.weight" -> "model.layers.4.router.weight" when the student's layer 3 is the
// teacher's layer 4; other names stay.
std::string teacher_name(const std::string& name, const std::vector<int64_t>& kept) {
  static const std::string prefix = "model.layers.";
  if (!name.starts_with(prefix)) return name;
  const size_t dot = name.find('.', prefix.size());
  const int64_t index = std::stoll(name.substr(prefix.size(), dot - prefix.size()));
  return prefix + std::to_string(kept[static_cast<size_t>(index)]) + name.substr(dot);
}

}  // namespace

Distiller::Distiller(const DistillSettings& settings, const ModelConfig& student, at::ScalarType dtype,
                     int64_t total_steps)
    : settings_(settings),
      teacher_(load_teacher(settings.teacher, dtype)),
      stop_step_(settings.stop_step(total_steps)) {
  const ModelConfig& teacher = teacher_.config();
  if (teacher.vocab_size != student.vocab_size) {
    throw InvalidArgument("distill.teacher: " + settings.teacher + " has vocab_size " +
                          std::to_string(teacher.vocab_size) + ", the student " + std::to_string(student.vocab_size));
  }
  const auto kept = kept_layers(teacher.num_layers(), settings.drop_layers);
  if (settings.student_from_teacher && static_cast<int64_t>(kept.size()) != student.num_layers()) {
    throw InvalidArgument("distill.drop_layers: leaves " + std::to_string(kept.size()) +
                          " layers of the teacher, the student has " + std::to_string(student.num_layers()));
  }
}

std::optional<TeacherSignal> Distiller::signal(const at::Tensor& tokens_BS, int64_t step) const {
  if (step >= stop_step_) return std::nullopt;
  c10::NoGradGuard no_grad;
  return TeacherSignal{.hidden_TD = teacher_.forward(tokens_BS, {.training = false}).hidden_TD,
                       .head_VD = teacher_.head(),
                       .alpha = settings_.alpha,
                       .temperature = settings_.temperature};
}

void Distiller::initialize(const LanguageModel& student) const {
  if (!settings_.student_from_teacher) return;
  c10::NoGradGuard no_grad;
  const auto kept = kept_layers(teacher_.config().num_layers(), settings_.drop_layers);
  std::map<std::string, at::Tensor> source;
  for (const Parameter& parameter : teacher_.parameters()) source[parameter.name] = parameter.tensor;
  for (const Parameter& parameter : student.parameters()) {
    const std::string name = teacher_name(parameter.name, kept);
    const auto found = source.find(name);
    if (found == source.end() || found->second.sizes() != parameter.logical_shape) {
      throw InvalidArgument("distill.drop_layers: " + parameter.name +
                            " of the student has no tensor of its shape in the teacher (" + name + ")");
    }
    at::Tensor(parameter.tensor).copy_(own_part(parameter, found->second));
  }
}

}  // namespace coterie
