#pragma once

#include <stddef.h>
#include <stdint.h>

// The C interface of the Rust crate text/rust. Only text/*.cpp include it.
//
// Every function that can fail returns a MoedTextCode. When it is not MOED_TEXT_OK, `*message` holds one sentence in
// UTF-8 and the other outputs are untouched. No function unwinds. Text goes in as pointer and size (need not end in
// NUL, must be UTF-8, the pointer may be null when the size is 0) and comes out as MoedTextBytes, which the caller
// gives back with moed_text_bytes_free. Handles may be used by many threads at once, and freed once, by one.

#ifdef __cplusplus
extern "C" {
#endif

typedef enum MoedTextCode {
  MOED_TEXT_OK = 0,
  MOED_TEXT_INVALID_ARGUMENT = 1,
  MOED_TEXT_NOT_FOUND = 2,
  MOED_TEXT_INTERNAL = 3,
} MoedTextCode;

typedef struct MoedTextBytes {
  uint8_t* data;
  size_t size;
  size_t capacity;
} MoedTextBytes;

void moed_text_bytes_free(MoedTextBytes* bytes);

// For tests: panics inside, so that it returns MOED_TEXT_INTERNAL.
int32_t moed_text_test_panic(MoedTextBytes* message);

typedef struct MoedTokenizer MoedTokenizer;

// Reads tokenizer.json and tokenizer_config.json in the folder `path`.
int32_t moed_tokenizer_load(const char* path, size_t path_size, MoedTokenizer** out, MoedTextBytes* message);
void moed_tokenizer_free(MoedTokenizer* tokenizer);
int32_t moed_tokenizer_is_byte_level(const MoedTokenizer* tokenizer);  // 0 or 1
// `bytes`: all tokens' bytes; `offsets`: native uint32_t [vocab_size + 1]; `flags`: uint8_t [vocab_size], bit 0: the id
// names a token, bit 1: it is special.
int32_t moed_tokenizer_vocabulary(const MoedTokenizer* tokenizer, MoedTextBytes* bytes, MoedTextBytes* offsets,
                                  MoedTextBytes* flags, MoedTextBytes* message);
// `ids`: native uint32_t.
int32_t moed_tokenizer_encode(const MoedTokenizer* tokenizer, const char* text, size_t text_size,
                              int32_t add_special_tokens, MoedTextBytes* ids, MoedTextBytes* message);
int32_t moed_tokenizer_decode(const MoedTokenizer* tokenizer, const uint32_t* ids, size_t num_ids,
                              int32_t skip_special_tokens, MoedTextBytes* text, MoedTextBytes* message);
// MOED_TEXT_NOT_FOUND when there is no such token.
int32_t moed_tokenizer_token_to_id(const MoedTokenizer* tokenizer, const char* token, size_t token_size, uint32_t* id,
                                   MoedTextBytes* message);
int32_t moed_tokenizer_id_to_token(const MoedTokenizer* tokenizer, uint32_t id, MoedTextBytes* token,
                                   MoedTextBytes* message);

typedef struct MoedChatTemplate MoedChatTemplate;

typedef struct MoedChatLimits {
  uint64_t fuel;
  uint64_t output_bytes;
  uint64_t memory_bytes;
  uint64_t milliseconds;
} MoedChatLimits;

typedef struct MoedChatRequest {
  const char* messages;  // JSON array
  size_t messages_size;
  const char* tools;  // JSON array, or size 0
  size_t tools_size;
  const char* kwargs;  // JSON object, or size 0
  size_t kwargs_size;
  int32_t add_generation_prompt;
  int32_t continue_final_message;
} MoedChatRequest;

int32_t moed_chat_load(const char* path, size_t path_size, const MoedChatLimits* limits, MoedChatTemplate** out,
                       MoedTextBytes* message);
int32_t moed_chat_from_source(const char* source, size_t source_size, const char* specials, size_t specials_size,
                              const MoedChatLimits* limits, MoedChatTemplate** out, MoedTextBytes* message);
void moed_chat_free(MoedChatTemplate* chat);
// The templates' text, and where it came from (a path).
int32_t moed_chat_source(const MoedChatTemplate* chat, MoedTextBytes* source, MoedTextBytes* origin,
                         MoedTextBytes* message);
int32_t moed_chat_render(const MoedChatTemplate* chat, const MoedChatRequest* request, MoedTextBytes* text,
                         MoedTextBytes* message);

#ifdef __cplusplus
}
#endif
