//! Chat templates: Jinja as transformers runs it, on minijinja.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use minijinja::value::Value;
use minijinja::{Environment, ErrorKind, State};
use serde_json::{Map, Value as Json};

use crate::bounded::{self, Abandoned, Stopped};
use crate::error::{internal, invalid, not_found, read_optional, shorten, Error, Result};
use crate::python;

const FILE_BYTES_MAX: u64 = 16 << 20;
const TEMPLATE_BYTES_MAX: usize = 1 << 20;
const MESSAGE_BYTES_MAX: usize = 512;
/// What a template's view of a value costs, in bytes: a map or string with its bookkeeping, and a character of a string
/// that `split` may turn into a value (in a list that doubles as it grows).
const NODE_BYTES: u64 = 160;
const TEXT_FACTOR: u64 = 24;
/// What transformers appends to the last message to find where the rendering must end.
const CONTINUE_TAG: &str = "CONTINUE_FINAL_MESSAGE_TAG ";
const SPECIAL_TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

#[derive(Clone, Copy)]
pub struct Limits {
    pub fuel: u64,
    pub output_bytes: u64,
    pub memory_bytes: u64,
    pub time: Duration,
}

pub struct Request<'a> {
    pub messages: &'a str,
    pub tools: &'a str,
    pub kwargs: &'a str,
    pub add_generation_prompt: bool,
    pub continue_final_message: bool,
}

pub struct ChatTemplate {
    environment: Arc<Environment<'static>>,
    /// Every template's text, for those who look for words in it.
    pub source: String,
    pub origin: String,
    specials: Map<String, Json>,
    limits: Limits,
    abandoned: Abandoned,
}

/// What raise_exception was called with.
#[derive(Debug)]
struct Raised(String);

impl std::fmt::Display for Raised {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

struct CappedOutput {
    text: Vec<u8>,
    max: usize,
    full: bool,
}

impl io::Write for CappedOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > self.max - self.text.len() {
            self.full = true;
            return Err(io::Error::other("the output is full"));
        }
        self.text.extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn unknown_method(
    state: &State,
    value: &Value,
    name: &str,
    args: &[Value],
) -> std::result::Result<Value, minijinja::Error> {
    if let (Some(text), [arg]) = (value.as_str(), args) {
        let affix = arg.as_str().unwrap_or_default();
        match name {
            "removeprefix" => return Ok(text.strip_prefix(affix).unwrap_or(text).into()),
            "removesuffix" => return Ok(text.strip_suffix(affix).unwrap_or(text).into()),
            _ => {}
        }
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args)
}

fn raise_exception(message: &Value) -> std::result::Result<Value, minijinja::Error> {
    let message = python::str(message)?;
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, "raise_exception").with_source(Raised(message)))
}

/// `{% generation %}` marks answers for training: `{% if true %}` keeps its white-space control and renders the same.
fn strip_generation(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        // Not from the start: "{%}" opens a tag and does not close it.
        let Some(length) = tag[2..].find("%}") else {
            rest = tag;
            break;
        };
        let end = 2 + length;
        let body = &tag[2..end];
        let word = body.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        let replacement = match word {
            "generation" => Some("if true"),
            "endgeneration" => Some("endif"),
            _ => None,
        };
        match replacement {
            Some(replacement) => {
                out.push_str("{%");
                out.push_str(&body.replacen(word, replacement, 1));
            }
            None => out.push_str(&tag[..end]),
        }
        out.push_str("%}");
        rest = &tag[end + 2..];
    }
    out.push_str(rest);
    out
}

fn environment(fuel: u64) -> Environment<'static> {
    let mut env = Environment::new();
    env.set_trim_blocks(true);
    env.set_lstrip_blocks(true);
    env.set_fuel(Some(fuel));
    env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    env.set_unknown_method_callback(unknown_method);
    env.set_formatter(|out, _, value| {
        if let Some(text) = value.as_str() {
            out.write_str(text)?;
        } else {
            out.write_str(&python::str(value)?)?;
        }
        Ok(())
    });
    env.add_filter("tojson", python::tojson);
    env.add_filter("string", |value: &Value| python::str(value));
    env.add_function("raise_exception", |message: &Value| raise_exception(message));
    env.add_function("strftime_now", |format: &str| python::strftime_now(format));
    env
}

fn sources<'a>(err: &'a (dyn std::error::Error + 'static)) -> impl Iterator<Item = &'a (dyn std::error::Error + 'static)> {
    std::iter::successors(Some(err), |err| err.source())
}

fn describe(err: &minijinja::Error) -> String {
    let mut text = err.kind().to_string();
    if let Some(detail) = err.detail() {
        text = format!("{text}: {detail}");
    }
    if let Some(line) = err.line() {
        text = format!("{text} (line {line})");
    }
    shorten(&text, MESSAGE_BYTES_MAX)
}

fn render_error(err: minijinja::Error, limits: &Limits, full: bool) -> Error {
    if full {
        return invalid(format!(
            "the chat template's output is longer than the limit of {} bytes (template_output_bytes)",
            limits.output_bytes
        ));
    }
    for source in sources(&err) {
        if let Some(raised) = source.downcast_ref::<Raised>() {
            return invalid(shorten(&raised.0, MESSAGE_BYTES_MAX));
        }
        if source.downcast_ref::<minijinja::Error>().is_some_and(|err| err.kind() == ErrorKind::OutOfFuel) {
            return invalid(format!(
                "the chat template ran past the limit of {} instructions (template_fuel)",
                limits.fuel
            ));
        }
    }
    invalid(format!("the chat template failed: {}", describe(&err)))
}

fn stopped_error(stopped: Stopped, limits: &Limits) -> Error {
    match stopped {
        Stopped::Memory => {
            invalid(format!("the chat template ran past the limit of {} bytes of memory", limits.memory_bytes))
        }
        Stopped::Time => invalid(format!("the chat template ran past the limit of {} s", limits.time.as_secs_f64())),
        Stopped::Abandoned => {
            invalid("the chat template ran past its memory or time too often and is no longer run")
        }
        Stopped::Panic => internal("the chat template met a fault in the template library"),
        Stopped::NoThread => internal("the system gave no thread to run the chat template on"),
    }
}

/// What the values of a request may cost a template, above. Not recursive past what the parser lets nest.
fn cost(value: &Json) -> u64 {
    let inside = match value {
        Json::String(text) => TEXT_FACTOR * text.len() as u64,
        Json::Array(items) => items.iter().map(cost).sum(),
        Json::Object(items) => items.iter().map(|(key, item)| TEXT_FACTOR * key.len() as u64 + cost(item)).sum(),
        _ => 0,
    };
    NODE_BYTES + inside
}

fn parse(text: &str, what: &str) -> Result<Json> {
    serde_json::from_str(text).map_err(|err| {
        let place = format!("line {}, column {}", err.line(), err.column());
        invalid(format!("{what} is not JSON ({place}) or nested too deeply"))
    })
}

fn parse_array(text: &str, what: &str) -> Result<Vec<Json>> {
    match parse(text, what)? {
        Json::Array(items) => Ok(items),
        _ => Err(invalid(format!("{what} must be an array"))),
    }
}

/// Appends the tag to the last message's content (its last text part).
fn tag_last(messages: &mut [Json]) -> Result<()> {
    let last = messages.last_mut().and_then(|message| message.get_mut("content"));
    let text = match last {
        Some(Json::String(text)) => Some(text),
        Some(Json::Array(parts)) => parts.iter_mut().rev().find_map(|part| match part.get_mut("text") {
            Some(Json::String(text)) => Some(text),
            _ => None,
        }),
        _ => None,
    };
    match text {
        Some(text) => {
            text.push_str(CONTINUE_TAG);
            Ok(())
        }
        None => Err(invalid("continue_final_message needs a last message with text")),
    }
}

fn cut_at_tag(mut text: String) -> Result<String> {
    let Some(at) = text.rfind(CONTINUE_TAG.trim_end()) else {
        return Err(invalid("continue_final_message: the chat template does not show the last message"));
    };
    let kept = text[at..].starts_with(CONTINUE_TAG);
    text.truncate(at);
    if !kept {
        text.truncate(text.trim_end().len());
    }
    Ok(text)
}

fn render_now(environment: &Environment<'_>, name: &str, variables: Json, limits: &Limits) -> Result<String> {
    let mut out = CappedOutput {
        text: Vec::new(),
        max: usize::try_from(limits.output_bytes).unwrap_or(usize::MAX),
        full: false,
    };
    let result = match environment.get_template(name) {
        Ok(template) => template.render_captured_to(variables, &mut out).map(|_| ()),
        Err(err) => Err(err),
    };
    if let Err(err) = result {
        return Err(render_error(err, limits, out.full));
    }
    String::from_utf8(out.text).map_err(|_| internal("the chat template's output is not UTF-8"))
}

impl ChatTemplate {
    /// `templates`: (name, source), of which "default" must be one.
    fn build(
        templates: Vec<(String, String)>,
        origin: String,
        specials: Map<String, Json>,
        limits: Limits,
    ) -> Result<ChatTemplate> {
        if !templates.iter().any(|(name, _)| name == "default") {
            return Err(invalid(format!("{origin}: chat_template has no template named \"default\"")));
        }
        if templates.iter().any(|(_, source)| source.len() > TEMPLATE_BYTES_MAX) {
            return Err(invalid(format!("{origin}: a chat template is longer than {TEMPLATE_BYTES_MAX} bytes")));
        }
        let source = templates.iter().map(|(_, source)| source.as_str()).collect::<Vec<_>>().join("\n");
        let abandoned = Abandoned::default();
        let bounds = bounded::Limits { memory_bytes: limits.memory_bytes, time: limits.time };
        let compiled = bounded::run(bounds, &abandoned, move || {
            let mut env = environment(limits.fuel);
            for (name, source) in templates {
                env.add_template_owned(name, strip_generation(&source)).map_err(|err| describe(&err))?;
            }
            Ok::<_, String>(env)
        });
        let environment = match compiled {
            Ok(Ok(environment)) => Arc::new(environment),
            Ok(Err(message)) => return Err(invalid(format!("{origin}: {message}"))),
            Err(stopped) => {
                let error = stopped_error(stopped, &limits);
                return Err(Error { message: format!("{origin}: {}", error.message), ..error });
            }
        };
        Ok(ChatTemplate { environment, source, origin, specials, limits, abandoned })
    }

    pub fn from_source(source: &str, specials: &str, limits: Limits) -> Result<ChatTemplate> {
        let Json::Object(specials) = parse(specials, "special_tokens")? else {
            return Err(invalid("special_tokens must be an object"));
        };
        Self::build(vec![("default".into(), source.into())], "chat template".into(), specials, limits)
    }

    pub fn load(folder: &Path, limits: Limits) -> Result<ChatTemplate> {
        let config_path = folder.join("tokenizer_config.json");
        let config = read_object(&config_path)?;
        let specials = special_tokens(folder, &config)?;
        let file_path = folder.join("chat_template.jinja");
        if let Some(bytes) = read_optional(&file_path, FILE_BYTES_MAX)? {
            let origin = file_path.display().to_string();
            let source = String::from_utf8(bytes).map_err(|_| invalid(format!("{origin}: not UTF-8")))?;
            return Self::build(vec![("default".into(), source)], origin, specials, limits);
        }
        let origin = config_path.display().to_string();
        match config.get("chat_template") {
            Some(Json::String(source)) => Self::build(vec![("default".into(), source.clone())], origin, specials, limits),
            Some(Json::Array(entries)) => {
                let templates = entries.iter().map(|entry| named_template(entry, &origin)).collect::<Result<_>>()?;
                Self::build(templates, origin, specials, limits)
            }
            None | Some(Json::Null) => Err(not_found(format!(
                "{}: the model has no chat template (neither chat_template.jinja nor chat_template in tokenizer_config.json)",
                folder.display()
            ))),
            Some(_) => Err(invalid(format!("{origin}: chat_template must be a string or a list of {{name, template}}"))),
        }
    }

    pub fn render(&self, request: &Request) -> Result<String> {
        let mut messages = parse_array(request.messages, "messages")?;
        let tools = match request.tools {
            "" => Vec::new(),
            text => parse_array(text, "tools")?,
        };
        let kwargs = match parse(if request.kwargs.is_empty() { "{}" } else { request.kwargs }, "chat_template_kwargs")? {
            Json::Object(kwargs) => kwargs,
            Json::Null => Map::new(),
            _ => return Err(invalid("chat_template_kwargs must be an object")),
        };
        if let Some(name) = ["messages", "tools"].iter().find(|name| kwargs.contains_key(**name)) {
            return Err(invalid(format!("chat_template_kwargs may not hold \"{name}\"")));
        }
        // A rendering that is stopped for its memory takes its thread with it: what the request alone can make too much
        // is refused before.
        let total = messages.iter().chain(&tools).chain(kwargs.values()).map(cost).sum::<u64>();
        if total > self.limits.memory_bytes / 4 {
            return Err(invalid(format!(
                "messages and chat_template_kwargs are too large for the chat template: {NODE_BYTES} bytes a value and \
                 {TEXT_FACTOR} a byte of text make {total}, the limit is {}",
                self.limits.memory_bytes / 4
            )));
        }
        if request.continue_final_message {
            if request.add_generation_prompt {
                return Err(invalid("continue_final_message excludes add_generation_prompt"));
            }
            tag_last(&mut messages)?;
        }
        let name = match !tools.is_empty() && self.environment.get_template("tool_use").is_ok() {
            true => "tool_use",
            false => "default",
        };
        let mut variables = self.specials.clone();
        variables.insert("add_generation_prompt".into(), request.add_generation_prompt.into());
        variables.insert("documents".into(), Json::Null);
        variables.extend(kwargs);
        variables.insert("messages".into(), messages.into());
        variables.insert("tools".into(), if tools.is_empty() { Json::Null } else { tools.into() });
        let text = self.run(name, Json::Object(variables))?;
        if request.continue_final_message {
            return cut_at_tag(text);
        }
        Ok(text)
    }

    fn run(&self, name: &'static str, variables: Json) -> Result<String> {
        let (environment, limits) = (self.environment.clone(), self.limits);
        let bounds = bounded::Limits { memory_bytes: limits.memory_bytes, time: limits.time };
        let result = bounded::run(bounds, &self.abandoned, move || render_now(&environment, name, variables, &limits));
        result.unwrap_or_else(|stopped| Err(stopped_error(stopped, &limits)))
    }
}

fn named_template(entry: &Json, origin: &str) -> Result<(String, String)> {
    match (entry.get("name").and_then(Json::as_str), entry.get("template").and_then(Json::as_str)) {
        (Some(name), Some(template)) => Ok((name.into(), template.into())),
        _ => Err(invalid(format!("{origin}: chat_template's entries must be {{name, template}} of strings"))),
    }
}

/// The file's object; empty when there is no file.
pub fn read_object(path: &Path) -> Result<Map<String, Json>> {
    let Some(bytes) = read_optional(path, FILE_BYTES_MAX)? else {
        return Ok(Map::new());
    };
    match serde_json::from_slice(&bytes) {
        Ok(Json::Object(object)) => Ok(object),
        Ok(_) => Err(invalid(format!("{}: must be a JSON object", path.display()))),
        Err(err) => Err(invalid(format!("{}: not JSON: {err}", path.display()))),
    }
}

/// A token's text, written as a string or as an AddedToken.
pub fn token_text(value: &Json) -> Option<&str> {
    value.as_str().or_else(|| value.get("content").and_then(Json::as_str))
}

/// bos_token and its kin, from tokenizer_config.json, else special_tokens_map.json, as strings.
pub fn special_tokens(folder: &Path, config: &Map<String, Json>) -> Result<Map<String, Json>> {
    let older = read_object(&folder.join("special_tokens_map.json"))?;
    let mut out = Map::new();
    for name in SPECIAL_TOKENS {
        // A null in tokenizer_config.json says that there is none.
        if let Some(text) = config.get(name).or_else(|| older.get(name)).and_then(token_text) {
            out.insert(name.into(), text.into());
        }
    }
    let more = config.get("additional_special_tokens").or_else(|| older.get("additional_special_tokens"));
    if let Some(Json::Array(tokens)) = more {
        let tokens: Vec<Json> = tokens.iter().filter_map(token_text).map(Json::from).collect();
        out.insert("additional_special_tokens".into(), tokens.into());
    }
    Ok(out)
}
