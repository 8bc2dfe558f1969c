#pragma once

#include "server/backend.h"
#include "server/settings.h"

namespace moed {

// `moed serve`: opens the doors, loads, serves until SIGTERM or SIGINT, drains, leaves. A second signal leaves at once.
// Main thread only; blocks the signals it handles in every thread made after it. Returns the exit code: 0 after a clean
// end, 1 after one line that says why not.
int serve(const LoadedSettings& loaded, const BackendFactory& factory);

// `moed health`: asks a daemon on this machine for /health. 0 when it answers 200, 1 otherwise.
int health(const HealthTarget& target);

}  // namespace moed
