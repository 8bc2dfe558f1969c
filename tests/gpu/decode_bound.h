#pragma once

#include <nlohmann/json.hpp>

namespace moed {

// The least time of a pass of `rows` decoded rows, by closed_form_bound() at the rates that gpu_probe found. bench:
// what `moed bench engine` wrote, of a published shape; probe: what gpu_probe wrote. A part of the device has the best
// rate of all that the probe measured of it. Null where that bounds nothing: no rows, rates of a tiny probe, or a
// policy under which the host computes experts, since its rates are not probed. Its attention is left out for the same
// reason.
nlohmann::ordered_json decode_bound(const nlohmann::ordered_json& bench, const nlohmann::ordered_json& probe,
                                    double rows);

}  // namespace moed
