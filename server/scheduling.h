#pragma once

#include "plan/kv_placement.h"
#include "plan/memory_budget.h"
#include "scheduler/scheduler.h"
#include "server/settings.h"

namespace moed {

// The block size of KV, tokens.
inline constexpr int32_t kKvBlockTokens = 16;

// What the settings ask for, with the KV and the contexts that the budget grants.
SchedulerConfig scheduler_config(const Settings& settings, const MemoryBudget& budget, KvPlacement kv);

}  // namespace moed
