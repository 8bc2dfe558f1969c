#include "server/scheduling.h"

namespace moed {

SchedulerConfig scheduler_config(const Settings& settings, const MemoryBudget& budget, KvPlacement kv) {
  SchedulerConfig config;
  config.block_tokens = kKvBlockTokens;
  config.num_blocks = budget.kv_blocks;
  config.device_blocks = budget.device.kv_blocks;
  config.kv = kv;
  config.max_model_len = budget.max_model_len;
  config.pass_rows_max = static_cast<int32_t>(settings.scheduler.pass_rows_max);
  config.sequences_max = static_cast<int32_t>(settings.scheduler.sequences_max);
  config.queue_max = static_cast<int32_t>(settings.scheduler.queue_max);
  config.queue_tokens_max = settings.scheduler.queue_tokens_max;
  config.bulk_rows_min = static_cast<int32_t>(settings.scheduler.bulk_rows_min);
  config.prefix_cache = settings.memory.prefix_cache;
  return config;
}

}  // namespace moed
