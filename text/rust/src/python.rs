//! What templates expect of Python: str() and repr() of values, json.dumps, strftime.

use std::fmt::Write;

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Error, ErrorKind};

const DEPTH_MAX: usize = 256;

fn error(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

fn check_depth(depth: usize) -> Result<(), Error> {
    if depth >= DEPTH_MAX {
        return Err(error(format!("a value is nested more than {DEPTH_MAX} deep")));
    }
    Ok(())
}

/// repr(float): the shortest digits, as 1.5, 1e+16 or 1e-07.
fn float_repr(value: f64) -> String {
    if !value.is_finite() {
        return if value.is_nan() { "nan" } else if value > 0.0 { "inf" } else { "-inf" }.into();
    }
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let plain = format!("{value}");
        return if plain.contains('.') { plain } else { plain + ".0" };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

fn number(value: &Value, infinity: [&str; 3]) -> Result<String, Error> {
    if value.is_integer() {
        return Ok(value.to_string());
    }
    let value = f64::try_from(value.clone())?;
    if value.is_finite() {
        return Ok(float_repr(value));
    }
    Ok(infinity[if value.is_nan() { 0 } else if value > 0.0 { 1 } else { 2 }].into())
}

fn string_repr(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            c if c == quote => {
                out.push('\\');
                out.push(c);
            }
            c if (c as u32) < 0x100 && c.is_control() => {
                let _ = write!(out, "\\x{:02x}", c as u32);
            }
            c => out.push(c),
        }
    }
    out.push(quote);
}

fn repr(value: &Value, out: &mut String, depth: usize) -> Result<(), Error> {
    check_depth(depth)?;
    match value.kind() {
        ValueKind::Undefined => out.push_str("Undefined"),
        ValueKind::None => out.push_str("None"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => out.push_str(&number(value, ["nan", "inf", "-inf"])?),
        ValueKind::String => string_repr(value.as_str().unwrap_or_default(), out),
        ValueKind::Seq | ValueKind::Iterable => {
            out.push('[');
            for (index, item) in value.try_iter()?.enumerate() {
                out.push_str(if index > 0 { ", " } else { "" });
                repr(&item, out, depth + 1)?;
            }
            out.push(']');
        }
        ValueKind::Map => {
            out.push('{');
            for (index, key) in value.try_iter()?.enumerate() {
                out.push_str(if index > 0 { ", " } else { "" });
                repr(&key, out, depth + 1)?;
                out.push_str(": ");
                repr(&value.get_item(&key)?, out, depth + 1)?;
            }
            out.push('}');
        }
        _ => out.push_str(&value.to_string()),
    }
    Ok(())
}

/// str(value), as `{{ value }}` prints it.
pub fn str(value: &Value) -> Result<String, Error> {
    let mut out = String::new();
    match value.kind() {
        ValueKind::Undefined => {}
        ValueKind::String => out.push_str(value.as_str().unwrap_or_default()),
        _ => repr(value, &mut out, 0)?,
    }
    Ok(out)
}

/// How json.dumps spaces and orders.
struct Style {
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
    sort_keys: bool,
    ascii: bool,
}

impl Style {
    fn newline(&self, depth: usize, out: &mut String) {
        if let Some(indent) = &self.indent {
            out.push('\n');
            for _ in 0..depth {
                out.push_str(indent);
            }
        }
    }

    fn string(&self, text: &str, out: &mut String) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if (c as u32) < 0x20 || (self.ascii && !(' '..='~').contains(&c)) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        let _ = write!(out, "\\u{unit:04x}");
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }

    fn key(&self, key: &Value, out: &mut String) -> Result<(), Error> {
        match key.kind() {
            ValueKind::String => self.string(key.as_str().unwrap_or_default(), out),
            ValueKind::Number | ValueKind::Bool | ValueKind::None => {
                let mut text = String::new();
                self.value(key, &mut text, 0)?;
                self.string(&text, out);
            }
            _ => return Err(error("tojson: a key is neither a string, a number, a boolean nor none")),
        }
        Ok(())
    }

    fn value(&self, value: &Value, out: &mut String, depth: usize) -> Result<(), Error> {
        check_depth(depth)?;
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => out.push_str(&number(value, ["NaN", "Infinity", "-Infinity"])?),
            ValueKind::String => self.string(value.as_str().unwrap_or_default(), out),
            ValueKind::Seq | ValueKind::Iterable => {
                let mut empty = true;
                out.push('[');
                for item in value.try_iter()? {
                    out.push_str(if empty { "" } else { &self.item_separator });
                    empty = false;
                    self.newline(depth + 1, out);
                    self.value(&item, out, depth + 1)?;
                }
                if !empty {
                    self.newline(depth, out);
                }
                out.push(']');
            }
            ValueKind::Map => self.map(value, out, depth)?,
            kind => return Err(error(format!("tojson: a value of type {kind} has no JSON"))),
        }
        Ok(())
    }

    fn map(&self, value: &Value, out: &mut String, depth: usize) -> Result<(), Error> {
        let mut keys: Vec<Value> = value.try_iter()?.collect();
        if self.sort_keys {
            keys.sort();
        }
        out.push('{');
        for (index, key) in keys.iter().enumerate() {
            out.push_str(if index > 0 { &self.item_separator } else { "" });
            self.newline(depth + 1, out);
            self.key(key, out)?;
            out.push_str(&self.key_separator);
            self.value(&value.get_item(key)?, out, depth + 1)?;
        }
        if !keys.is_empty() {
            self.newline(depth, out);
        }
        out.push('}');
        Ok(())
    }
}

/// The filter `tojson(ensure_ascii=False, indent=None, separators=None, sort_keys=False)`: json.dumps.
pub fn tojson(value: &Value, kwargs: Kwargs) -> Result<String, Error> {
    let indent = match kwargs.get::<Option<Value>>("indent")? {
        None => None,
        Some(value) if value.is_none() => None,
        Some(value) => match value.as_str() {
            Some(text) if text.len() <= 64 => Some(text.to_string()),
            Some(_) => return Err(error("tojson: indent is longer than 64")),
            None => match u8::try_from(value) {
                Ok(width) if width <= 64 => Some(" ".repeat(width as usize)),
                _ => return Err(error("tojson: indent must be from 0 to 64")),
            },
        },
    };
    let separators = kwargs.get::<Option<Vec<String>>>("separators")?;
    let (item_separator, key_separator) = match separators.as_deref() {
        None if indent.is_some() => (",".into(), ": ".into()),
        None => (", ".into(), ": ".into()),
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(error("tojson: separators must be a pair")),
    };
    let style = Style {
        indent,
        item_separator,
        key_separator,
        sort_keys: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        ascii: kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
    };
    kwargs.assert_all_used()?;
    let mut out = String::new();
    style.value(value, &mut out, 0)?;
    Ok(out)
}

/// datetime.now().strftime(format).
pub fn strftime_now(format: &str) -> Result<String, Error> {
    if format.len() > 256 {
        return Err(error("strftime_now: the format is longer than 256 bytes"));
    }
    // A leading character tells an empty answer from one that did not fit.
    let format = std::ffi::CString::new(format!("x{format}")).map_err(|_| error("strftime_now: a NUL in the format"))?;
    let mut buffer = [0u8; 8192];
    // SAFETY: the pointers are valid for the calls, the buffer's size is passed on, and tm is plain data.
    let size = unsafe {
        let now = libc::time(std::ptr::null_mut());
        let mut parts: libc::tm = std::mem::zeroed();
        libc::localtime_r(&now, &mut parts);
        libc::strftime(buffer.as_mut_ptr().cast(), buffer.len(), format.as_ptr(), &parts)
    };
    if size == 0 {
        return Err(error("strftime_now: the text is longer than 8192 bytes"));
    }
    Ok(String::from_utf8_lossy(&buffer[1..size]).into_owned())
}
