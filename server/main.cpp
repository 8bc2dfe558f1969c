#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <string>
#include <string_view>
#include <vector>

#include "server/backend.h"
#include "server/bench_engine.h"
#include "server/serve.h"
#include "server/settings.h"

namespace {

constexpr const char* kUsage =
    "moed " MOED_VERSION
    ": serves mixture-of-experts language models\n\n"
    "  moed serve --model DIR [--config FILE] [...]   serve a checkpoint over HTTP and gRPC; `moed serve --help` "
    "lists\n"
    "                                                 every setting\n"
    "  moed health [--config FILE] [--host H] [--http-port N]\n"
    "                                                 exit 0 when the daemon on this machine answers /health with "
    "200;\n"
    "                                                 reads the same file and environment as serve\n"
    "  moed bench engine --model DIR|--shape NAME [...]\n"
    "                                                 measure the engine on a device, simulated ones included; "
    "`--help`\n"
    "  moed docs-config                               print docs/CONFIG.md\n"
    "  moed version                                   print the version\n";

int run_serve(const std::vector<std::string>& args) {
  auto loaded = moed::load_settings(args, environ);
  if (!loaded.ok()) {
    std::fprintf(stderr, "moed: %s\n", loaded.status().message().c_str());
    return 1;
  }
  if (loaded->help) {
    std::fputs(moed::settings_help().c_str(), stdout);
    return 0;
  }
  if (loaded->print_config) {
    std::fputs(moed::settings_toml(loaded->settings).c_str(), stdout);
    return 0;
  }
  return moed::serve(*loaded, moed::load_backend);
}

int run_health(const std::vector<std::string>& args) {
  const auto target = moed::load_health_target(args, environ);
  if (target.ok()) return moed::health(*target);
  std::fprintf(stderr, "moed health: %s\n", target.status().message().c_str());
  return 2;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string_view command = argc > 1 ? argv[1] : "help";
  const std::vector<std::string> args(argv + std::min(argc, 2), argv + argc);
  if (command == "serve") return run_serve(args);
  if (command == "health") return run_health(args);
  if (command == "bench") {
    if (args.empty() || args.front() != "engine") {
      std::fputs("moed bench: there is `moed bench engine`\n", stderr);
      return 2;
    }
    return moed::bench_engine({args.begin() + 1, args.end()}, environ);
  }
  if (command == "docs-config") {
    std::fputs(moed::settings_markdown().c_str(), stdout);
    return 0;
  }
  if (command == "version" || command == "--version") {
    std::puts("moed " MOED_VERSION);
    return 0;
  }
  const bool asked = command == "help" || command == "--help" || command == "-h";
  if (!asked) std::fprintf(stderr, "moed: unknown command '%s'\n\n", argv[1]);
  std::fputs(kUsage, asked ? stdout : stderr);
  return asked ? 0 : 2;
}
