// The TOML file of --config: what it sets, printed and read again, is the same.
#include <vector>

#include "server/settings.h"
#include "tests/fuzz/fuzz.h"

namespace moed {
namespace {

StatusOr<LoadedSettings> load(const std::string& file, bool print) {
  std::vector<std::string> args = {"--config", file};
  if (print) args.emplace_back("--print-config");
  const char* const environment[] = {nullptr};
  return load_settings(args, environment);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const TemporaryFolder folder;
  folder.write("moed.toml", input_text(data, size));
  const auto first = load(folder.file("moed.toml"), true);
  if (!first.ok()) {
    check_refusal(first.status());
    return 0;
  }
  // The checks across fields, of which --print-config knows nothing.
  if (const auto whole = load(folder.file("moed.toml"), false); !whole.ok()) check_refusal(whole.status());
  folder.write("printed.toml", settings_toml(first->settings));
  const auto second = load(folder.file("printed.toml"), true);
  MOED_CHECK(second.ok()) << second.status().message();
  MOED_CHECK(settings_json(second->settings) == settings_json(first->settings)) << settings_toml(first->settings);
  return 0;
}

}  // namespace moed
