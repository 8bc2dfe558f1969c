//! Hugging Face tokenizers: loading, encoding, decoding, and the table of every token's bytes.

use std::collections::HashMap;
use std::path::Path;

use serde_json::Value as Json;
use tokenizers::{AddedToken, Decoder, Tokenizer as HfTokenizer};

use crate::chat::{read_object, special_tokens, token_text};
use crate::error::{internal, invalid, read_file, shorten, Result};

const FILE_BYTES_MAX: u64 = 512 << 20;
const ID_MAX: u32 = 1 << 24;

pub struct Tokenizer {
    inner: HfTokenizer,
    style: Style,
}

/// How tokens spell their bytes.
struct Style {
    /// GPT-2's alphabet, one character a byte.
    byte_level: bool,
    /// "<0x0A>" is a byte.
    byte_fallback: bool,
    /// This character is a space (SentencePiece's U+2581).
    space: Option<String>,
    /// None of these: ask the decoder.
    other: bool,
}

pub struct Vocabulary {
    pub bytes: Vec<u8>,
    /// [largest id + 2] into `bytes`.
    pub offsets: Vec<u32>,
    /// Bit 0: names a token; bit 1: special.
    pub flags: Vec<u8>,
}

fn collect_decoders<'a>(decoder: &'a Json, out: &mut Vec<&'a Json>) {
    match decoder.get("decoders").and_then(Json::as_array) {
        Some(inner) => inner.iter().for_each(|decoder| collect_decoders(decoder, out)),
        None => out.push(decoder),
    }
}

impl Style {
    fn of(inner: &HfTokenizer) -> Style {
        let decoder = serde_json::to_value(inner.get_decoder()).unwrap_or(Json::Null);
        let mut steps = Vec::new();
        collect_decoders(&decoder, &mut steps);
        let is = |step: &Json, name: &str| step.get("type").and_then(Json::as_str) == Some(name);
        let byte_level = steps.iter().any(|step| is(step, "ByteLevel"))
            && steps.iter().all(|step| is(step, "ByteLevel") || is(step, "Fuse"));
        let byte_fallback = steps.iter().any(|step| is(step, "ByteFallback"));
        let space = steps.iter().find_map(|step| {
            if is(step, "Metaspace") {
                return step.get("replacement").and_then(Json::as_str);
            }
            let replaces = is(step, "Replace") && step.get("content").and_then(Json::as_str) == Some(" ");
            step.get("pattern").filter(|_| replaces)?.get("String")?.as_str()
        });
        let other = !byte_level && !byte_fallback && space.is_none();
        Style { byte_level, byte_fallback, space: space.map(str::to_string), other }
    }
}

/// GPT-2's alphabet: printable Latin-1 characters stand for themselves, the others for U+0100 and up.
fn byte_alphabet() -> HashMap<char, u8> {
    let mut out = HashMap::new();
    let mut next = 0x100;
    for byte in 0..=255u8 {
        let printable = matches!(byte, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
        let c = if printable {
            byte as char
        } else {
            next += 1;
            char::from_u32(next - 1).unwrap_or('?')
        };
        out.insert(c, byte);
    }
    out
}

fn fallback_byte(token: &str) -> Option<u8> {
    if token.len() != 6 || !token.is_ascii() {
        return None;
    }
    u8::from_str_radix(token.strip_prefix("<0x")?.strip_suffix('>')?, 16).ok()
}

impl Tokenizer {
    pub fn load(folder: &Path) -> Result<Tokenizer> {
        let path = folder.join("tokenizer.json");
        let bytes = read_file(&path, FILE_BYTES_MAX)?;
        let mut inner = HfTokenizer::from_bytes(&bytes)
            .map_err(|err| invalid(format!("{}: not a tokenizer: {}", path.display(), shorten(&err.to_string(), 300))))?;
        // Whatever was in force when the file was saved: prompts are neither cut nor filled here.
        inner.with_truncation(None).map_err(|err| internal(format!("{}: {err}", path.display())))?;
        inner.with_padding(None);
        let config = read_object(&folder.join("tokenizer_config.json"))?;
        let specials = special_tokens(folder, &config)?;
        let more = specials.get("additional_special_tokens").and_then(Json::as_array).cloned().unwrap_or_default();
        let known: Vec<AddedToken> = specials
            .values()
            .chain(more.iter())
            .filter_map(token_text)
            .filter(|text| !text.is_empty() && inner.token_to_id(text).is_some())
            .filter(|text| !inner.get_added_vocabulary().is_special_token(text))
            .map(|text| AddedToken::from(text.to_string(), true))
            .collect();
        inner.add_special_tokens(known).map_err(|err| internal(format!("{}: {err}", path.display())))?;
        let style = Style::of(&inner);
        Ok(Tokenizer { inner, style })
    }

    pub fn is_byte_level(&self) -> bool {
        self.style.byte_level
    }

    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        match self.inner.encode_fast(text, add_special_tokens) {
            Ok(encoding) => Ok(encoding.get_ids().to_vec()),
            // The library's message may quote the text.
            Err(_) => Err(invalid("the tokenizer cannot encode this text")),
        }
    }

    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        self.inner.decode(ids, skip_special_tokens).map_err(|_| internal("the tokenizer cannot decode these tokens"))
    }

    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    pub fn id_to_token(&self, id: u32) -> Option<String> {
        let added = self.inner.get_added_vocabulary();
        added.simple_id_to_token(id).or_else(|| self.inner.id_to_token(id))
    }

    fn token_bytes(&self, token: &str, alphabet: &HashMap<char, u8>) -> Vec<u8> {
        let style = &self.style;
        if style.byte_level {
            let bytes: Option<Vec<u8>> = token.chars().map(|c| alphabet.get(&c).copied()).collect();
            return bytes.unwrap_or_else(|| token.as_bytes().to_vec());
        }
        if let Some(byte) = fallback_byte(token).filter(|_| style.byte_fallback) {
            return vec![byte];
        }
        match (&style.space, self.inner.get_decoder()) {
            (Some(space), _) => token.replace(space.as_str(), " ").into_bytes(),
            (None, Some(decoder)) if style.other => match decoder.decode(vec![token.to_string()]) {
                Ok(text) => text.into_bytes(),
                Err(_) => token.as_bytes().to_vec(),
            },
            _ => token.as_bytes().to_vec(),
        }
    }

    pub fn vocabulary(&self) -> Result<Vocabulary> {
        let vocabulary = self.inner.get_vocab(true);
        let Some(largest) = vocabulary.values().max().copied() else {
            return Err(invalid("tokenizer.json: the vocabulary is empty"));
        };
        if largest > ID_MAX {
            return Err(invalid(format!("tokenizer.json: token id {largest} is above the limit of {ID_MAX}")));
        }
        let alphabet = byte_alphabet();
        let added = self.inner.get_added_vocabulary();
        let mut out = Vocabulary { bytes: Vec::new(), offsets: vec![0], flags: Vec::new() };
        for id in 0..=largest {
            let token = self.id_to_token(id);
            let mut flags = 0;
            if let Some(token) = token {
                out.bytes.extend_from_slice(&self.token_bytes(&token, &alphabet));
                flags = 1 | if added.is_special_token(&token) { 2 } else { 0 };
            }
            let end = u32::try_from(out.bytes.len()).map_err(|_| invalid("tokenizer.json: tokens exceed 4 GiB"))?;
            out.offsets.push(end);
            out.flags.push(flags);
        }
        Ok(out)
    }
}
