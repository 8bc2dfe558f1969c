//! Tokenizers and chat templates for moed, behind the C header text/text_ffi.h. No export unwinds: each returns a code
//! and, unless the code is 0, a message.

mod bounded;
mod chat;
mod error;
mod ffi;
mod python;
mod tokenizer;

#[global_allocator]
static ALLOCATOR: bounded::BudgetAllocator = bounded::BudgetAllocator;
