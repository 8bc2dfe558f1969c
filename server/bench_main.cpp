#include <unistd.h>

#include "server/bench_engine.h"

// `moed bench engine` where there is no daemon (MOED_ENGINE_ONLY).
int main(int argc, char** argv) { return moed::bench_engine({argv + 1, argv + argc}, environ); }
