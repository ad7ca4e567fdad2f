#include "io/json.h"

#include <set>
#include <vector>

#include "coterie/error.h"
#include "io/printable.h"

namespace coterie {
namespace {

// Watches the parser: refuses what the DOM would silently accept.
class StrictEvents {
 public:
  StrictEvents(const std::string& source, int max_depth) : source_(source), max_depth_(max_depth) {}

  void see(nlohmann::json::parse_event_t event, const nlohmann::json& parsed) {
    using Event = nlohmann::json::parse_event_t;
    if (event == Event::object_start || event == Event::array_start) {
      if (static_cast<int>(keys_.size()) == max_depth_) {
        throw CorruptFile(source_ + ": JSON nested deeper than " + std::to_string(max_depth_));
      }
      keys_.emplace_back();
    } else if (event == Event::object_end || event == Event::array_end) {
      keys_.pop_back();
    } else if (event == Event::key) {
      const auto& key = parsed.get_ref<const std::string&>();
      if (!keys_.back().insert(key).second) throw CorruptFile(source_ + ": key " + printable(key) + " occurs twice");
    }
  }

 private:
  const std::string& source_;
  const int max_depth_;
  std::vector<std::set<std::string>> keys_;  // of the open objects (empty for arrays), outermost first
};

}  // namespace

nlohmann::json parse_json(std::string_view text, const std::string& source, int max_depth) {
  // The parser takes a zero byte for the end of its input and would not see what follows.
  if (const size_t zero = text.find('\0'); zero != std::string_view::npos) {
    throw CorruptFile(source + ": invalid JSON at byte " + std::to_string(zero));
  }
  StrictEvents events(source, max_depth);
  try {
    return nlohmann::json::parse(text, [&](int, nlohmann::json::parse_event_t event, nlohmann::json& parsed) {
      events.see(event, parsed);
      return true;
    });
  } catch (const nlohmann::json::parse_error& error) {
    throw CorruptFile(source + ": invalid JSON at byte " + std::to_string(error.byte > 0 ? error.byte - 1 : 0));
  } catch (const nlohmann::json::out_of_range&) {
    throw CorruptFile(source + ": a JSON number is too large");
  }
}

}  // namespace coterie
