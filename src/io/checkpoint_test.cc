// Checkpoints on disk: ranges across pieces of any cut, what is missing, twice there or damaged, pruning, and processes
// that are killed while they save.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <random>
#include <set>
#include <thread>

#include "io/atomic_file.h"
#include "io/checkpoint_directory.h"
#include "io/checkpoint_source.h"
#include "io/test_files.h"

namespace coterie {
namespace {

namespace fs = std::filesystem;

std::vector<float> counted(int64_t count) {
  std::vector<float> values(static_cast<size_t>(count));
  std::iota(values.begin(), values.end(), 0.0f);
  return values;
}

// The row-major numbers of 21 elements in an order, from its definition as [slices, rows, run].
std::vector<float> counted_in(const ElementOrder& order) {
  if (order == ElementOrder{}) return counted(21);
  std::vector<float> values;
  for (int64_t column = 0; column < order.row; column += order.run) {
    for (int64_t row = 0; row < 21; row += order.row) {
      for (int64_t i = 0; i < order.run; ++i) values.push_back(static_cast<float>(row + column + i));
    }
  }
  return values;
}

class CheckpointTest : public TemporaryDirectoryTest {
 protected:
  void SetUp() override {
    TemporaryDirectoryTest::SetUp();
    path_ = (directory() / "checkpoints").string();
  }

  // Cuts "w" [7, 3], whose row-major element i is i, at the given places of an order, a piece per rank in turn.
  std::string save(int64_t step, const std::vector<int64_t>& cuts, int64_t keep = 2, int ranks = 2,
                   const ElementOrder& order = {}) const {
    const std::vector<float> values = counted_in(order);
    const CheckpointDirectory checkpoints(path_);
    checkpoints.begin(CheckpointDirectory::step_name(step));
    std::vector<std::vector<PieceToWrite>> of_rank(static_cast<size_t>(ranks));
    for (size_t i = 0; i + 1 < cuts.size(); ++i) {
      of_rank[i % of_rank.size()].push_back(
          {"w", {7, 3}, DType::kF32, cuts[i], cuts[i + 1] - cuts[i], values.data() + cuts[i], order});
    }
    of_rank[0].push_back({"empty", {0, 4}, DType::kBF16});
    for (int rank = 0; rank < ranks; ++rank)
      checkpoints.write_shard(CheckpointDirectory::step_name(step), rank, of_rank[static_cast<size_t>(rank)]);
    return checkpoints.commit(CheckpointDirectory::step_name(step),
                              {.num_ranks = ranks, .state = {{"step", step}}, .keep = keep});
  }

  std::set<std::string> names() const {
    std::set<std::string> found;
    for (const auto& entry : fs::directory_iterator(path_)) found.insert(entry.path().filename());
    return found;
  }

  void replace(const std::string& file, const std::string& from, const std::string& to) const {
    std::string text = read_text_file(file);
    ASSERT_NE(text.find(from), std::string::npos) << text;
    text.replace(text.find(from), from.size(), to);
    write_text_file(file, text);
  }

  std::string open_message(const std::string& path) const {
    return corrupt_message([&] { CheckpointSource source(path); }, path + "/manifest.json: ");
  }

  std::string path_;
};

TEST_F(CheckpointTest, ReadsAnyRangeOfAnyCut) {
  for (const std::vector<int64_t>& cuts : {std::vector<int64_t>{0, 21}, {0, 9, 21}, {0, 1, 2, 10, 20, 21}}) {
    const CheckpointSource source(save(1, cuts));
    EXPECT_EQ(source.state()["step"], 1);
    ASSERT_EQ(source.tensors().size(), 2u);
    EXPECT_EQ(source.find("w")->shape, (std::vector<int64_t>{7, 3}));
    EXPECT_EQ(source.find("v"), nullptr);
    source.read("empty", nullptr);
    for (int64_t first = 0; first <= 21; ++first) {
      for (int64_t count = 0; first + count <= 21; ++count) {
        std::vector<float> got(static_cast<size_t>(count), -1), expected(static_cast<size_t>(count));
        std::iota(expected.begin(), expected.end(), static_cast<float>(first));
        source.read_range("w", first, count, got.data());
        EXPECT_EQ(got, expected) << first << " " << count;
      }
    }
    float unused = 0;
    const auto read = [&](const char* name, int64_t first, int64_t count) {
      return invalid_message([&] { source.read_range(name, first, count, &unused); }, source.path() + ": ");
    };
    EXPECT_EQ(read("w", 20, 2), "tensor 'w': has no 2 elements from 20 on, but 21");
    EXPECT_EQ(read("w", 1, INT64_MAX), "tensor 'w': has no 9223372036854775807 elements from 1 on, but 21");
    EXPECT_EQ(read("v", 0, 1), "tensor 'v': is missing");
  }
}

TEST_F(CheckpointTest, ReadsAnyOrderFromAnyOther) {
  const std::vector<ElementOrder> orders = {{}, {3, 1}, {7, 1}, {21, 7}, {21, 3}, {21, 21}, {7, 7}};
  for (const ElementOrder& saved : orders) {
    const CheckpointSource source(save(1, {0, 4, 10, 21}, 2, 3, saved));
    for (const ElementOrder& wanted : orders) {
      const std::vector<float> all = counted_in(wanted);
      for (int64_t first = 0; first <= 21; ++first) {
        for (int64_t count = 0; first + count <= 21; ++count) {
          std::vector<float> got(static_cast<size_t>(count), -1);
          source.read_range("w", first, count, got.data(), wanted);
          ASSERT_TRUE(std::equal(got.begin(), got.end(), all.begin() + first))
              << saved.run << " in " << saved.row << ", " << wanted.run << " in " << wanted.row;
        }
      }
    }
  }
}

TEST_F(CheckpointTest, RefusesToCommitWhatIsNotWhole) {
  const auto failure = [&](const std::vector<std::array<int64_t, 2>>& pieces) {
    const std::vector<float> values = counted(21);
    const CheckpointDirectory checkpoints(path_);
    checkpoints.begin("step-00000005");
    for (size_t rank = 0; rank < pieces.size(); ++rank) {
      const auto [first, count] = pieces[rank];
      const std::vector<int64_t> shape = first == 20 ? std::vector<int64_t>{3, 7} : std::vector<int64_t>{7, 3};
      const ElementOrder order = first == 19 ? ElementOrder{3, 1} : ElementOrder{};
      const PieceToWrite piece{"w", shape, DType::kF32, first, count, values.data() + first, order};
      checkpoints.write_shard("step-00000005", static_cast<int>(rank), {&piece, 1});
    }
    const std::string message =
        corrupt_message([&] { checkpoints.commit("step-00000005", {.num_ranks = static_cast<int>(pieces.size())}); },
                        path_ + "/tmp-step-00000005");
    EXPECT_FALSE(checkpoints.latest());
    return message;
  };
  EXPECT_EQ(failure({{0, 9}, {10, 11}}), ": tensor 'w': elements 9 to 9 are missing");
  EXPECT_EQ(failure({{0, 9}}), ": tensor 'w': elements 9 to 20 are missing");
  EXPECT_EQ(failure({{0, 0}}), ": tensor 'w': elements 0 to 20 are missing");
  EXPECT_EQ(
      failure({{0, 12}, {10, 11}}),
      ": tensor 'w': elements 10 to 11 are there twice, in 'rank-00000.safetensors' and 'rank-00001.safetensors'");
  const char* const differs = "/rank-00001.json: tensor 'w': its shape, dtype or order is not the other ranks'";
  EXPECT_EQ(failure({{0, 20}, {20, 1}}), differs);
  EXPECT_EQ(failure({{0, 19}, {19, 2}}), differs);
}

TEST_F(CheckpointTest, NamesTheRankThatDidNotWrite) {
  const CheckpointDirectory checkpoints(path_);
  checkpoints.begin("one");
  checkpoints.write_shard("one", 0, {});
  EXPECT_EQ(message<CommError>([&] { checkpoints.commit("one", {.num_ranks = 2, .timeout_s = 0.02}); }, path_),
            "/tmp-one/rank-00001.json: rank 1 did not write its part of the checkpoint in time");
}

TEST_F(CheckpointTest, FindsDamage) {
  const std::string path = save(1, {0, 9, 21}), shard = path + "/rank-00001.safetensors";
  std::string bytes = read_text_file(shard);
  const auto read = [&] {
    std::vector<float> w(21);
    return corrupt_message([&] { CheckpointSource(path).read("w", w.data()); }, shard + ": ");
  };
  EXPECT_EQ(read(), "");
  const size_t data = bytes.size() - 12 * sizeof(float);
  for (size_t i = data; i < bytes.size(); ++i) {  // each bit of the tensor's bytes in turn
    for (int bit = 0; bit < 8; ++bit) {
      std::string changed = bytes;
      changed[i] = static_cast<char>(changed[i] ^ (1 << bit));
      std::ofstream(shard, std::ios::binary) << changed;
      ASSERT_EQ(read(), "tensor 'w@9': is damaged: its crc32 is not the one in manifest.json");
    }
  }
  std::ofstream(shard, std::ios::binary) << bytes.substr(0, bytes.size() - 4);
  EXPECT_EQ(read(), "tensors cover 48 bytes, but the file holds 44");
  fs::remove(shard);
  EXPECT_EQ(open_message(path), "tensor 'w': file 'rank-00001.safetensors' is missing");
}

// Each bit of a header's bytes in turn, and each byte as a whole: one line names the file, or nothing has changed.
TEST_F(CheckpointTest, FindsDamageInHeaders) {
  const std::string path = save(1, {0, 5, 9, 21}), shard = path + "/rank-00000.safetensors";
  const std::string bytes = read_text_file(shard);
  const size_t header = bytes.size() - 17 * sizeof(float);
  int found = 0;
  for (size_t i = 0; i < header; ++i) {
    for (const int mask : {1, 2, 4, 8, 16, 32, 64, 128, 255}) {
      std::string changed = bytes;
      changed[i] = static_cast<char>(changed[i] ^ mask);
      std::ofstream(shard, std::ios::binary) << changed;
      std::vector<float> w(21);
      const std::string said = corrupt_message([&] { CheckpointSource(path).read("w", w.data()); }, shard + ": ");
      ASSERT_FALSE(said.starts_with("/")) << said;  // another file
      ASSERT_EQ(said.find('\n'), std::string::npos);
      ASSERT_EQ(said.find("@0': is missing"), std::string::npos) << said;
      if (said.empty()) {
        ASSERT_EQ(w, counted(21)) << "byte " << i << " ^ " << mask;
      }
      found += !said.empty();
    }
  }
  EXPECT_GT(found, 8 * static_cast<int>(header) / 2);
  const auto with = [&](const std::string& from, const std::string& to) {
    std::string changed = bytes;
    changed.replace(changed.find(from), from.size(), to);
    std::ofstream(shard, std::ios::binary) << changed;
    return corrupt_message([&] { CheckpointSource source(path); }, shard + ": ");
  };
  EXPECT_EQ(with("w@9", "w@8"),
            "header: has no tensor 'w@9', which manifest.json lists: this file or manifest.json is damaged");
  EXPECT_EQ(with("F32", "I32"),
            "header: tensor 'w@0' has another shape or dtype than manifest.json says: this file or manifest.json is "
            "damaged");
}

TEST_F(CheckpointTest, RefusesManifestsThatLie) {
  const std::string original = save(1, {0, 9, 21});
  const auto changed = [&](const std::string& from, const std::string& to) {
    const fs::path copy = directory() / "copy";
    fs::remove_all(copy);
    fs::copy(original, copy);
    replace((copy / "manifest.json").string(), from, to);
    return open_message(copy.string());
  };
  EXPECT_EQ(changed("\"format\": 1", "\"format\": 2"), "format: '2' is not a whole number of 1 to 1");
  EXPECT_EQ(changed("\"first\": 9", "\"first\": 8"),
            "tensor 'w': elements 8 to 8 are there twice, in 'rank-00000.safetensors' and 'rank-00001.safetensors'");
  EXPECT_EQ(changed("\"count\": 9", "\"count\": 8"), "tensor 'w': elements 8 to 8 are missing");
  EXPECT_EQ(changed("\"first\": 9", "\"first\": 21"), "tensor 'w': pieces[1]: first: 21 is beyond the 21 elements");
  EXPECT_EQ(changed("\"count\": 12", "\"count\": 13"),
            "tensor 'w': pieces[1]: count: '13' is not a whole number of 1 to 12");
  EXPECT_EQ(changed("\"F32\"", "\"I64\""), "tensor 'w': dtype: 'I64' is not one of F32, F16, BF16");
  EXPECT_EQ(changed("\"rank-00001", "\"../rank-00001"),
            "tensor 'w': pieces[1]: file: '../rank-00001.safetensors' is not the plain name of a .safetensors file");
  const auto ordered = [&](const std::string& order) {
    return changed("\"w\": {", "\"w\": {\"element_order\": " + order + ", ");
  };
  EXPECT_EQ(ordered("{\"row\": 21, \"run\": 7}"), "");
  EXPECT_EQ(ordered("3"), "tensor 'w': element_order: is not an object");
  EXPECT_EQ(ordered("{\"row\": 3}"), "tensor 'w': element_order: run: is missing");
  EXPECT_EQ(ordered("{\"row\": 6, \"run\": 2}"), "tensor 'w': element_order: row: 6 does not divide the 21 elements");
  EXPECT_EQ(ordered("{\"row\": 3, \"run\": 2}"), "tensor 'w': element_order: run: 2 does not divide the row of 3");
  for (const char* zero : {"{\"row\": 0, \"run\": 1}", "{\"run\": 0, \"row\": 3}"}) {
    EXPECT_NE(ordered(zero).find("'0' is not a whole number of 1 to 9223372036854775807"), std::string::npos);
  }
  EXPECT_EQ(changed("\"state\"", "\"stale\""), "state: is missing");
  EXPECT_EQ(changed("\"step\": 1", "\"step\": 3"), "state: is damaged: its crc32 is not state_crc32");
  EXPECT_EQ(changed("7,", "9223372036854775807,"), "tensor 'w': shape: product exceeds 2^60");
  EXPECT_NE(changed("\"w\"", "\"v\"").find("header: has no tensor 'v@0'"), std::string::npos);
  EXPECT_NE(changed("\"F32\"", "\"F16\"").find("header: tensor 'w@0' has another shape or dtype"), std::string::npos);
  fs::remove(fs::path(original) / "manifest.json");
  EXPECT_EQ(corrupt_message([&] { CheckpointSource source(original); }, original),
            ": holds no manifest.json, so it is no checkpoint of this version");
}

TEST_F(CheckpointTest, KeepsTheNewest) {
  const CheckpointDirectory checkpoints(path_);
  EXPECT_FALSE(checkpoints.latest());
  for (const int64_t step : {5, 10, 123456789}) save(step, {0, 21});
  EXPECT_EQ(names(), (std::set<std::string>{"latest", "step-00000010", "step-123456789"}));
  // A run that went back to step 10 and saved 11: what lies ahead is older than what it continued from.
  save(11, {0, 21});
  EXPECT_EQ(names(), (std::set<std::string>{"latest", "step-00000010", "step-00000011"}));
  EXPECT_EQ(save(11, {0, 21}), path_ + "/step-00000011.2");
  EXPECT_EQ(names(), (std::set<std::string>{"latest", "step-00000011", "step-00000011.2"}));
  EXPECT_EQ(checkpoints.latest(), path_ + "/step-00000011.2");
  save(12, {0, 21}, 1);
  EXPECT_EQ(names(), (std::set<std::string>{"latest", "step-00000012"}));
  for (const char* name : {"../x", "step-00000011", "step-/../..", "..", ""}) {
    write_text_file(path_ + "/latest", name);
    EXPECT_EQ(corrupt_message([&] { checkpoints.latest(); }, path_ + "/latest"),
              std::string(": there is no checkpoint '") + name + "'");
  }
}

TEST_F(CheckpointTest, ReplacesAName) {
  const CheckpointDirectory checkpoints(path_);
  const auto save_as = [&](const std::string& name, bool latest) {
    checkpoints.begin(name);
    checkpoints.write_shard(name, 0, {});
    return checkpoints.commit(name, {.keep = 0, .replace = true, .latest = latest});
  };
  fs::create_directories(path_ + "/tmp-of-others");
  EXPECT_EQ(save_as("best", true), path_ + "/best");
  EXPECT_EQ(save_as("worst", false), path_ + "/worst");
  EXPECT_EQ(save_as("best", true), path_ + "/best");
  EXPECT_EQ(names(), (std::set<std::string>{"best", "latest", "tmp-of-others", "worst"}));
  EXPECT_EQ(checkpoints.latest(), path_ + "/best");
  for (const std::string name : {"", ".", "..", "a/b", "latest"}) {
    EXPECT_EQ(invalid_message([&] { checkpoints.begin(name); }, path_ + ": '" + name + "' "),
              "can't be the name of a checkpoint");
  }
}

// A process saves in a loop, as two ranks, until it is killed: whatever `latest` names can be read whole, as can every
// other step-*, and the next process goes on from there. It dies
// at a random moment of its first, second or third save.
TEST_F(CheckpointTest, KilledAtAnyMomentLatestIsWhole) {
  const auto start = std::chrono::steady_clock::now();
  save(1, {0, 21});
  const auto one_save = std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::steady_clock::now() - start);
  std::mt19937 random(1);
  int64_t last = 1;
  for (int kill_number = 0; kill_number < 30; ++kill_number) {
    int saved[2];
    char byte = 0;
    ASSERT_EQ(pipe(saved), 0);
    const pid_t child = fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      for (int64_t step = last + 1;; ++step) {
        save(step, {0, step % 20 + 1, 21});
        if (::write(saved[1], "", 1) != 1) abort();
      }
    }
    const int64_t least = last + kill_number % 3;
    for (int64_t i = last; i < least; ++i) ASSERT_EQ(read(saved[0], &byte, 1), 1);
    std::this_thread::sleep_for(std::chrono::microseconds(random() % one_save.count()));
    kill(child, SIGKILL);
    int status = 0;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    ASSERT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
    const auto latest = CheckpointDirectory(path_).latest();
    ASSERT_TRUE(latest);
    for (const std::string& name : names()) {
      if (!name.starts_with("step-")) continue;
      std::vector<float> w(21);
      CheckpointSource(path_ + "/" + name).read("w", w.data());
      ASSERT_EQ(w, counted(21)) << name;
    }
    const int64_t step = CheckpointSource(*latest).state()["step"].get<int64_t>();
    ASSERT_GE(step, least);
    last = step;
    close(saved[0]), close(saved[1]);
  }
}

}  // namespace
}  // namespace coterie
