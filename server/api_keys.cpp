#include "server/api_keys.h"

#include <openssl/crypto.h>
#include <openssl/sha.h>

#include <fstream>

namespace moed {

namespace {

// What editors and secret stores leave behind a key.
std::string_view trimmed(std::string_view line) { return line.substr(0, line.find_last_not_of(" \t\r\n") + 1); }

}  // namespace

StatusOr<ApiKeys> ApiKeys::load(const std::string& file, const std::string& key) {
  ApiKeys keys;
  if (!key.empty()) {
    if (trimmed(key).empty()) return invalid_argument("MOED_API_KEY holds no key (server.api_key)");
    keys.digests_.push_back(digest(trimmed(key)));
  }
  if (file.empty()) return keys;
  std::ifstream lines(file);
  if (!lines) return invalid_argument("cannot read the key file " + file + " (server.api_key_file)");
  std::string line;
  while (std::getline(lines, line)) {
    if (!trimmed(line).empty()) keys.digests_.push_back(digest(trimmed(line)));
  }
  if (keys.empty()) return invalid_argument("the key file " + file + " holds no key (server.api_key_file)");
  return keys;
}

bool ApiKeys::accepts(std::string_view presented) const {
  const Digest given = digest(presented);
  int matches = 0;
  for (const Digest& digest : digests_) matches += CRYPTO_memcmp(given.data(), digest.data(), given.size()) == 0;
  return matches > 0;
}

ApiKeys::Digest ApiKeys::digest(std::string_view text) {
  Digest out{};
  SHA256(reinterpret_cast<const unsigned char*>(text.data()), text.size(), out.data());
  return out;
}

}  // namespace moed
