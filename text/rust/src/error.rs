//! Errors as they cross into C++: a code of text_ffi.h and one sentence.

use std::fs;
use std::io::{self, Read};
use std::path::Path;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(i32)]
pub enum Code {
    InvalidArgument = 1,
    NotFound = 2,
    Internal = 3,
}

#[derive(Debug)]
pub struct Error {
    pub code: Code,
    pub message: String,
}

pub type Result<T> = std::result::Result<T, Error>;

pub fn invalid(message: impl Into<String>) -> Error {
    Error { code: Code::InvalidArgument, message: message.into() }
}

pub fn not_found(message: impl Into<String>) -> Error {
    Error { code: Code::NotFound, message: message.into() }
}

pub fn internal(message: impl Into<String>) -> Error {
    Error { code: Code::Internal, message: message.into() }
}

/// At most `max` bytes of `text`, cut at a character, control characters replaced: fit for a log line.
pub fn shorten(text: &str, max: usize) -> String {
    let mut out = String::new();
    for c in text.chars() {
        if out.len() + c.len_utf8() > max {
            out.push_str("...");
            break;
        }
        out.push(if c.is_control() { ' ' } else { c });
    }
    out
}

/// The file's bytes. NotFound when it does not exist; InvalidArgument when it is larger than `bytes_max`, no regular
/// file or unreadable. Symbolic links are followed.
pub fn read_file(path: &Path, bytes_max: u64) -> Result<Vec<u8>> {
    let fail = |err: io::Error| match err.kind() {
        io::ErrorKind::NotFound => not_found(format!("{}: no such file", path.display())),
        _ => invalid(format!("{}: cannot be read: {err}", path.display())),
    };
    let meta = fs::metadata(path).map_err(fail)?;
    if !meta.is_file() {
        return Err(invalid(format!("{}: not a regular file", path.display())));
    }
    let too_large = || invalid(format!("{}: larger than the limit of {bytes_max} bytes", path.display()));
    if meta.len() > bytes_max {
        return Err(too_large());
    }
    let mut bytes = Vec::with_capacity(meta.len() as usize);
    let file = fs::File::open(path).map_err(fail)?;
    file.take(bytes_max + 1).read_to_end(&mut bytes).map_err(fail)?;
    if bytes.len() as u64 > bytes_max {
        return Err(too_large());
    }
    Ok(bytes)
}

/// As `read_file`, but None when the file does not exist.
pub fn read_optional(path: &Path, bytes_max: u64) -> Result<Option<Vec<u8>>> {
    match read_file(path, bytes_max) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(err) if err.code == Code::NotFound => Ok(None),
        Err(err) => Err(err),
    }
}
