#include "model/weight_store.h"

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <sstream>

#include "base/check.h"
#include "base/log.h"
#include "coterie/error.h"
#include "io/gguf.h"
#include "io/gguf_parts.h"
#include "kernels/kernel_table.h"

namespace coterie {
namespace {

namespace fs = std::filesystem;

constexpr size_t kSlabBytes = size_t{64} << 20;
constexpr size_t kAlignment = 64;
// Raised with every change of what panels look like, and of what lies in them.
constexpr int kPanelVersion = 4;
constexpr std::string_view kSuffix = ".coterie";

// Name, size and time of change of every file that a model may be read from.
nlohmann::json sources_of(const fs::path& model) {
  std::vector<fs::path> files;
  if (fs::is_directory(model)) {
    for (const fs::directory_entry& entry : fs::directory_iterator(model)) {
      const std::string extension = entry.path().extension().string();
      if (entry.is_regular_file() && (extension == ".safetensors" || extension == ".json"))
        files.push_back(entry.path());
    }
    std::ranges::sort(files);
  } else {
    for (const std::string& part : gguf_parts(model.string())) {
      if (fs::exists(part)) files.emplace_back(part);
    }
  }
  nlohmann::json sources = nlohmann::json::array();
  for (const fs::path& file : files) {
    sources.push_back(
        {file.filename().string(), fs::file_size(file), fs::last_write_time(file).time_since_epoch().count()});
  }
  return sources;
}

// After which the packed weights are named: of a split model its first part, whichever is given. A whole model may be
// named like a part.
std::string main_file(const std::string& model) {
  return gguf_parts(model).size() > 1 ? GgufSource(model).path() : model;
}

// What the name of a model's file begins with. In a directory for many models they are told apart by where they lie.
std::string place_of_file(const std::string& model_path, const std::string& directory) {
  const bool in_directory = fs::is_directory(model_path);
  const std::string main = in_directory ? model_path : main_file(model_path);
  if (directory.empty()) return in_directory ? (fs::path(main) / "weights-").string() : main + "-";
  const fs::path whole = fs::canonical(main);
  std::ostringstream place;
  place << whole.filename().string() << '-' << std::hex << std::hash<std::string>()(whole.string()) << '-';
  return (fs::path(directory) / place.str()).string();
}

// What a process that was killed left of a file in the making. Names: PATH.PID.tmp.
void remove_leftovers(const fs::path& path) {
  const std::string prefix = path.filename().string() + ".";
  for (const fs::directory_entry& entry : fs::directory_iterator(path.parent_path())) {
    const std::string name = entry.path().filename().string();
    if (!name.starts_with(prefix) || !name.ends_with(".tmp")) continue;
    const int pid = std::atoi(name.c_str() + prefix.size());
    std::error_code ignored;
    if (pid > 0 && kill(pid, 0) != 0 && errno == ESRCH) fs::remove(entry.path(), ignored);
  }
}

// Without the file a start packs anew, into memory; but a model that is to stay mapped might not fit there, and a
// directory that somebody named is meant.
void not_kept(const WeightCache& cache, const std::exception& why) {
  if (cache.required) {
    throw InvalidArgument(cache.path +
                          ": packed weights belong into this file, which cannot be written: " + why.what());
  }
  log_info(std::string("weights: not kept: ") + why.what());
}

bool write_file(const WeightCache& cache, const std::function<void(WeightStore&)>& pack) {
  const std::string own = cache.path + "." + std::to_string(getpid());  // others may be at it, too
  try {
    log_info("weights: packing into " + cache.path);
    fs::create_directories(fs::absolute(cache.path).parent_path());
    remove_leftovers(fs::absolute(cache.path));
    WritingStore store(own);
    pack(store);
    store.commit(cache.description);
    fs::rename(own, cache.path);
    return true;
  } catch (const ResourceExhausted& error) {
    not_kept(cache, error);
  } catch (const fs::filesystem_error& error) {  // something else stands where the file belongs
    std::error_code ignored;
    fs::remove(own, ignored);
    not_kept(cache, error);
  } catch (const InvalidArgument& error) {
    if (access(fs::path(cache.path).parent_path().c_str(), W_OK) == 0) throw;  // it was the model's fault
    not_kept(cache, error);
  }
  return false;
}

std::unique_ptr<WeightStore> open_file(const WeightCache& cache, ThreadPool& pool) {
  std::optional<BlockFile> file = BlockFile::open(cache.path, cache.description);
  if (!file || (cache.verified && !file->verify(pool))) return nullptr;
  log_info("weights: from " + cache.path);
  return std::make_unique<FileStore>(std::move(*file));
}

}  // namespace

AlignedBuffer MemoryStore::block(const std::string&, size_t bytes, const std::function<void(AlignedBuffer)>& fill) {
  const size_t padded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  if (slabs_.empty() || slabs_.back().size() - used_ < padded) {
    slabs_.emplace_back(std::max(padded, kSlabBytes));
    used_ = 0;
  }
  void* const memory = slabs_.back().as<char>() + used_;
  used_ += padded;
  fill(AlignedBuffer::borrowed(memory, bytes));
  return AlignedBuffer::borrowed(memory, bytes);
}

AlignedBuffer WritingStore::block(const std::string& name, size_t bytes,
                                  const std::function<void(AlignedBuffer)>& fill) {
  scratch_.reserve(bytes);
  fill(AlignedBuffer::borrowed(scratch_.data(), bytes));
  writer_.add(name, scratch_.data(), bytes);
  return AlignedBuffer::borrowed(scratch_.data(), bytes);
}

AlignedBuffer FileStore::block(const std::string& name, size_t bytes, const std::function<void(AlignedBuffer)>&) {
  AlignedBuffer found = file_.find(name);
  COTERIE_CHECK(found.data() && found.size() == bytes, name + " is not in the file of packed weights");
  return found;
}

WeightCache weight_cache(const std::string& model_path, const std::string& types, const std::string& directory) {
  const int width = active_kernels().width;  // what panels depend on
  std::string name = types;
  std::ranges::replace(name, ' ', '_');
  std::erase(name, ',');
  name += "-w" + std::to_string(width) + std::string(kSuffix);
  const nlohmann::json description = {
      {"sources", sources_of(model_path)}, {"types", types}, {"panel_width", width}, {"panel_version", kPanelVersion}};
  return {.path = place_of_file(model_path, directory) + name, .description = description.dump()};
}

std::unique_ptr<WeightStore> cached_weights(const WeightCache& cache, const std::function<void(WeightStore&)>& pack,
                                            ThreadPool& pool) {
  if (auto store = open_file(cache, pool)) return store;
  return write_file(cache, pack) ? open_file(cache, pool) : nullptr;
}

}  // namespace coterie
