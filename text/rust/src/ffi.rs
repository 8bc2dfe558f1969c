//! The exports of text/text_ffi.h; that header says what each argument is.

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::Path;
use std::sync::Once;
use std::time::Duration;

use crate::chat::{ChatTemplate, Limits, Request};
use crate::error::{internal, invalid, not_found, Result};
use crate::tokenizer::Tokenizer;

#[repr(C)]
pub struct Bytes {
    data: *mut u8,
    size: usize,
    capacity: usize,
}

#[repr(C)]
pub struct ChatLimits {
    fuel: u64,
    output_bytes: u64,
    memory_bytes: u64,
    milliseconds: u64,
}

#[repr(C)]
pub struct ChatRequest {
    messages: *const u8,
    messages_size: usize,
    tools: *const u8,
    tools_size: usize,
    kwargs: *const u8,
    kwargs_size: usize,
    add_generation_prompt: i32,
    continue_final_message: i32,
}

impl Bytes {
    fn from_vec(mut bytes: Vec<u8>) -> Bytes {
        let out = Bytes { data: bytes.as_mut_ptr(), size: bytes.len(), capacity: bytes.capacity() };
        std::mem::forget(bytes);
        out
    }
}

/// Gives `bytes` to C++.
unsafe fn put(out: *mut Bytes, bytes: Vec<u8>) {
    out.write(Bytes::from_vec(bytes));
}

fn native_bytes(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_ne_bytes()).collect()
}

unsafe fn slice<'a, T>(data: *const T, size: usize) -> &'a [T] {
    if size == 0 {
        return &[];
    }
    std::slice::from_raw_parts(data, size)
}

unsafe fn text<'a>(data: *const u8, size: usize, what: &str) -> Result<&'a str> {
    std::str::from_utf8(slice(data, size)).map_err(|_| invalid(format!("{what} is not UTF-8")))
}

/// Runs `work`, so that nothing unwinds past it, and turns what it returns into a code and a message.
unsafe fn guard(message: *mut Bytes, work: impl FnOnce() -> Result<()>) -> i32 {
    static QUIET: Once = Once::new();
    // The default hook prints what the panic says, which may be a prompt's text.
    QUIET.call_once(|| std::panic::set_hook(Box::new(|_| {})));
    let result = catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|_| Err(internal("a fault in the tokenizer and template library")));
    match result {
        Ok(()) => 0,
        Err(err) => {
            put(message, err.message.into_bytes());
            err.code as i32
        }
    }
}

impl From<&ChatLimits> for Limits {
    fn from(limits: &ChatLimits) -> Limits {
        Limits {
            // minijinja counts in isize.
            fuel: limits.fuel.min(isize::MAX as u64),
            output_bytes: limits.output_bytes,
            memory_bytes: limits.memory_bytes,
            time: Duration::from_millis(limits.milliseconds),
        }
    }
}

// SAFETY, for every export: text_ffi.h obliges the caller to pass pointers that are valid for the call.

#[no_mangle]
pub unsafe extern "C" fn moed_text_bytes_free(bytes: *mut Bytes) {
    let bytes = &mut *bytes;
    if !bytes.data.is_null() {
        drop(Vec::from_raw_parts(bytes.data, bytes.size, bytes.capacity));
        bytes.data = std::ptr::null_mut();
    }
}

/// For tests: a fault behind an export reaches the caller as a code.
#[no_mangle]
pub unsafe extern "C" fn moed_text_test_panic(message: *mut Bytes) -> i32 {
    guard(message, || panic!("asked for by a test"))
}

#[no_mangle]
pub unsafe extern "C" fn moed_tokenizer_load(
    path: *const u8,
    path_size: usize,
    out: *mut *mut Tokenizer,
    message: *mut Bytes,
) -> i32 {
    guard(message, || {
        let tokenizer = Tokenizer::load(Path::new(text(path, path_size, "the model's path")?))?;
        out.write(Box::into_raw(Box::new(tokenizer)));
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn moed_tokenizer_free(tokenizer: *mut Tokenizer) {
    if !tokenizer.is_null() {
        let _ = catch_unwind(AssertUnwindSafe(|| drop(Box::from_raw(tokenizer))));
    }
}

#[no_mangle]
pub unsafe extern "C" fn moed_tokenizer_is_byte_level(tokenizer: *const Tokenizer) -> i32 {
    (*tokenizer).is_byte_level() as i32
}

#[no_mangle]
pub unsafe extern "C" fn moed_tokenizer_vocabulary(
    tokenizer: *const Tokenizer,
    bytes: *mut Bytes,
    offsets: *mut Bytes,
    flags: *mut Bytes,
    message: *mut Bytes,
) -> i32 {
    guard(message, || {
        let vocabulary = (*tokenizer).vocabulary()?;
        put(offsets, native_bytes(&vocabulary.offsets));
        put(bytes, vocabulary.bytes);
        put(flags, vocabulary.flags);
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn moed_tokenizer_encode(
    tokenizer: *const Tokenizer,
    data: *const u8,
    size: usize,
    add_special_tokens: i32,
    ids: *mut Bytes,
    message: *mut Bytes,
) -> i32 {
    guard(message, || {
        let encoded = (*tokenizer).encode(text(data, size, "the text")?, add_special_tokens != 0)?;
        put(ids, native_bytes(&encoded));
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn moed_tokenizer_decode(
    tokenizer: *const Tokenizer,
    ids: *const u32,
    num_ids: usize,
    skip_special_tokens: i32,
    out: *mut Bytes,
    message: *mut Bytes,
) -> i32 {
    guard(message, || {
        let decoded = (*tokenizer).decode(slice(ids, num_ids), skip_special_tokens != 0)?;
        put(out, decoded.into_bytes());
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn moed_tokenizer_token_to_id(
    tokenizer: *const Tokenizer,
    token: *const u8,
    token_size: usize,
    id: *mut u32,
    message: *mut Bytes,
) -> i32 {
    guard(message, || {
        let token = text(token, token_size, "the token")?;
        let found = (*tokenizer).token_to_id(token).ok_or_else(|| not_found("no such token"))?;
        id.write(found);
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn moed_tokenizer_id_to_token(
    tokenizer: *const Tokenizer,
    id: u32,
    token: *mut Bytes,
    message: *mut Bytes,
) -> i32 {
    guard(message, || {
        let found = (*tokenizer).id_to_token(id).ok_or_else(|| not_found("no such token"))?;
        put(token, found.into_bytes());
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn moed_chat_load(
    path: *const u8,
    path_size: usize,
    limits: *const ChatLimits,
    out: *mut *mut ChatTemplate,
    message: *mut Bytes,
) -> i32 {
    guard(message, || {
        let path = Path::new(text(path, path_size, "the model's path")?);
        let chat = ChatTemplate::load(path, Limits::from(&*limits))?;
        out.write(Box::into_raw(Box::new(chat)));
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn moed_chat_from_source(
    source: *const u8,
    source_size: usize,
    specials: *const u8,
    specials_size: usize,
    limits: *const ChatLimits,
    out: *mut *mut ChatTemplate,
    message: *mut Bytes,
) -> i32 {
    guard(message, || {
        let source = text(source, source_size, "the chat template")?;
        let specials = text(specials, specials_size, "special_tokens")?;
        let chat = ChatTemplate::from_source(source, specials, Limits::from(&*limits))?;
        out.write(Box::into_raw(Box::new(chat)));
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn moed_chat_free(chat: *mut ChatTemplate) {
    if !chat.is_null() {
        let _ = catch_unwind(AssertUnwindSafe(|| drop(Box::from_raw(chat))));
    }
}

#[no_mangle]
pub unsafe extern "C" fn moed_chat_source(
    chat: *const ChatTemplate,
    source: *mut Bytes,
    origin: *mut Bytes,
    message: *mut Bytes,
) -> i32 {
    guard(message, || {
        put(source, (*chat).source.clone().into_bytes());
        put(origin, (*chat).origin.clone().into_bytes());
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn moed_chat_render(
    chat: *const ChatTemplate,
    request: *const ChatRequest,
    out: *mut Bytes,
    message: *mut Bytes,
) -> i32 {
    guard(message, || {
        let request = &*request;
        let request = Request {
            messages: text(request.messages, request.messages_size, "messages")?,
            tools: text(request.tools, request.tools_size, "tools")?,
            kwargs: text(request.kwargs, request.kwargs_size, "chat_template_kwargs")?,
            add_generation_prompt: request.add_generation_prompt != 0,
            continue_final_message: request.continue_final_message != 0,
        };
        let rendered = (*chat).render(&request)?;
        put(out, rendered.into_bytes());
        Ok(())
    })
}
