#include "io/checkpoint_directory.h"

#include <zlib.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <thread>
#include <tuple>
#include <utility>

#include "coterie/error.h"
#include "io/atomic_file.h"
#include "io/checkpoint_manifest.h"
#include "io/printable.h"
#include "io/safetensors.h"

namespace coterie {
namespace {

namespace fs = std::filesystem;

constexpr char kStep[] = "step-";
constexpr char kAside[] = "tmp-";      // being written
constexpr char kGoing[] = "removed-";  // being removed
constexpr std::chrono::milliseconds kPoll{5};

std::string padded(int64_t number, size_t digits) {
  const std::string text = std::to_string(number);
  return std::string(text.size() < digits ? digits - text.size() : 0, '0') + text;
}

std::string shard_name(int rank) { return "rank-" + padded(rank, 5) + ".safetensors"; }
std::string list_name(int rank) { return "rank-" + padded(rank, 5) + ".json"; }  // the shard's part of the manifest

// std::filesystem's errors as ours; `path` is what they are about.
template <typename Action>
auto on_disk(const std::string& path, Action&& action) {
  try {
    return action();
  } catch (const fs::filesystem_error& error) {
    throw InvalidArgument(path + ": cannot be changed: " + error.code().message());
  }
}

std::vector<std::string> names_in(const std::string& directory) {
  std::vector<std::string> names;
  for (const fs::directory_entry& entry : fs::directory_iterator(directory)) {
    names.push_back(entry.path().filename().string());
  }
  return names;
}

// The shard's list comes last and by a rename: when it is there, all is.
void wait_for(const std::string& path, int rank, double timeout_s, const std::stop_token& stop) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(timeout_s);
  while (!fs::exists(path)) {
    if (stop.stop_requested() || std::chrono::steady_clock::now() > end) {
      const std::string reason = stop.stop_requested() ? "before the run ended" : "in time";
      throw CommError(path + ": rank " + std::to_string(rank) + " did not write its part of the checkpoint " + reason);
    }
    std::this_thread::sleep_for(kPoll);
  }
}

// Step and repetition of a checkpoint's name; nothing for other names.
std::optional<std::pair<int64_t, int64_t>> parse_name(const std::string& name) {
  const char* const end = name.data() + name.size();
  std::pair<int64_t, int64_t> parsed{0, 1};
  if (!name.starts_with(kStep)) return std::nullopt;
  auto [next, error] = std::from_chars(name.data() + std::strlen(kStep), end, parsed.first);
  if (error == std::errc() && next != end && *next == '.') {
    const auto repetition = std::from_chars(next + 1, end, parsed.second);
    next = repetition.ptr, error = repetition.ec;
  }
  return error == std::errc() && next == end ? std::optional(parsed) : std::nullopt;
}

bool is_plain(const std::string& name) {
  return !name.empty() && name[0] != '.' && name != "latest" &&
         name.find_first_of(std::string("/\\\0", 3)) == std::string::npos;
}

}  // namespace

std::string CheckpointDirectory::step_name(int64_t step) { return kStep + padded(step, 8); }

std::string CheckpointDirectory::aside(const std::string& name) const {
  return (fs::path(path_) / (kAside + name)).string();
}

std::optional<std::string> CheckpointDirectory::latest() const {
  const std::string link = (fs::path(path_) / "latest").string();
  if (!fs::exists(link)) return std::nullopt;
  std::string name = read_text_file(link);
  while (!name.empty() && name.back() == '\n') name.pop_back();
  const std::string path = (fs::path(path_) / name).string();
  if (!is_plain(name) || !fs::is_directory(path))
    throw CorruptFile(link + ": there is no checkpoint " + printable(name));
  return path;
}

// Others may keep files of their own here.
std::string CheckpointDirectory::begin(const std::string& name) const {
  if (!is_plain(name)) throw InvalidArgument(path_ + ": " + printable(name) + " can't be the name of a checkpoint");
  const auto is_left_over = [&](const std::string& found, const std::string& prefix) {
    const std::string rest = found.starts_with(prefix) ? found.substr(prefix.size()) : "";
    return rest == name || parse_name(rest);
  };
  return on_disk(path_, [&] {
    fs::create_directories(path_);
    for (const std::string& found : names_in(path_)) {
      if (is_left_over(found, kAside) || is_left_over(found, kGoing)) fs::remove_all(fs::path(path_) / found);
    }
    fs::create_directory(aside(name));
    return aside(name);
  });
}

void CheckpointDirectory::write_shard(const std::string& name, int rank, std::span<const PieceToWrite> pieces) const {
  CheckpointManifest list;
  std::vector<TensorToWrite> tensors;
  for (const PieceToWrite& piece : pieces) {
    CheckpointTensor& tensor = list.tensors[piece.tensor];
    tensor.dtype = piece.dtype;
    tensor.shape = piece.shape;
    tensor.order = piece.order;
    if (piece.count == 0) continue;
    const size_t bytes = static_cast<size_t>(piece.count) * dtype_size(piece.dtype);
    const auto sum = crc32_z(0, static_cast<const Bytef*>(piece.data), bytes);
    tensor.pieces.push_back({shard_name(rank), piece.first, piece.count, static_cast<uint32_t>(sum)});
    tensors.push_back({piece_key(piece.tensor, piece.first), {piece.count}, piece.dtype, piece.data});
  }
  const fs::path directory = aside(name);
  write_safetensors((directory / shard_name(rank)).string(), tensors);
  write_text_file((directory / list_name(rank)).string(), manifest_text(list));
}

std::string CheckpointDirectory::commit(const std::string& wanted, const Commit& commit, std::stop_token stop) const {
  const fs::path directory = aside(wanted);
  CheckpointManifest manifest{.state = commit.state};
  for (int rank = 0; rank < commit.num_ranks; ++rank) {
    const std::string list = (directory / list_name(rank)).string();
    wait_for(list, rank, commit.timeout_s, stop);
    add_pieces(manifest, parse_manifest(read_text_file(list), list), list);
  }
  check_coverage(manifest, directory.string());
  write_text_file((directory / "manifest.json").string(), manifest_text(manifest));
  return on_disk(path_, [&] {
    for (int rank = 0; rank < commit.num_ranks; ++rank) fs::remove(directory / list_name(rank));
    sync_directory(directory.string());
    std::string name = wanted;
    const fs::path going = fs::path(path_) / (kGoing + name);
    if (commit.replace && fs::exists(fs::path(path_) / name)) fs::rename(fs::path(path_) / name, going);
    for (int i = 2; fs::exists(fs::path(path_) / name); ++i) name = wanted + "." + std::to_string(i);
    fs::rename(directory, fs::path(path_) / name);
    sync_directory(path_);
    fs::remove_all(going);
    if (commit.latest) write_text_file((fs::path(path_) / "latest").string(), name + "\n");
    if (commit.keep > 0) prune(commit.keep, name);
    return (fs::path(path_) / name).string();
  });
}

// The `keep` newest stay, of which `latest` is one. Those of a later step than the latest are the oldest: a run left
// them when it went back. What goes loses its name first, so that every step-* is whole.
void CheckpointDirectory::prune(int64_t keep, const std::string& latest) const {
  const auto newest = parse_name(latest).value();
  std::vector<std::tuple<bool, std::pair<int64_t, int64_t>, std::string>> others;
  for (const std::string& name : names_in(path_)) {
    const auto parsed = parse_name(name);
    if (parsed && name != latest) others.emplace_back(*parsed < newest, *parsed, name);
  }
  std::sort(others.begin(), others.end());
  for (size_t i = 0; i + static_cast<size_t>(keep - 1) < others.size(); ++i) {
    const std::string& name = std::get<2>(others[i]);
    const fs::path going = fs::path(path_) / (kGoing + name);
    fs::rename(fs::path(path_) / name, going);
    fs::remove_all(going);
  }
}

}  // namespace coterie
