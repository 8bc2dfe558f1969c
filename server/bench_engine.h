#pragma once

#include <string>
#include <vector>

namespace moed {

// `moed bench engine`: scheduler and engine without doors and text, driven by clients in a closed loop, on any device;
// on a simulated one without weights, and every figure then says so. `args`: what follows "bench engine"; `environment`
// as of load_settings. Returns the exit code: 0, 1 for a failure, each with one line on stderr.
int bench_engine(const std::vector<std::string>& args, const char* const* environment);

// One line a flag, for help.
std::string bench_engine_help();

}  // namespace moed
