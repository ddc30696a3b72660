//! One layout file: parsing and its own rules. Knows the schema, not which files exist.

use super::tables::Tables;
use super::{Layout, LayoutError, Meaning};
use crate::cpython::version::{Flavour, PythonVersion};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::ops::RangeInclusive;

/// The schemas that are read. 2 had no `interpreter_frame.is_entry`.
const SCHEMAS: RangeInclusive<u64> = 2..=3;

/// What to do with a patch release that was not measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Beyond {
    /// Use the file if the run-time self-test passes, and say so.
    Check,
    /// Refuse.
    Refuse,
}

/// The fields of the process's own table, in order.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DebugOffsetsShape {
    /// Bytes of the table.
    pub size: u64,
    /// `table.key` of each 8-byte field, from offset 0.
    pub fields: Vec<String>,
}

/// One measurement behind a file.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measured {
    /// 3.X.Y.
    pub version: String,
    /// Architecture.
    pub arch: String,
    /// `dwarf` or `headers`.
    pub source: String,
    /// Build id of the binary measured.
    pub build_id: Option<String>,
}

/// A parsed layout file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayoutFile {
    /// Its name, for messages.
    pub name: String,
    /// 3.X.
    pub minor: String,
    /// Flavour it holds for.
    pub flavour: Flavour,
    /// First and last patch release measured.
    pub patches: (u8, u8),
    /// What of patches outside that range.
    pub beyond: Beyond,
    /// What the offsets alone don't say.
    pub meaning: Meaning,
    /// The process's own table (3.13+).
    pub debug_offsets: Option<DebugOffsetsShape>,
    /// The offsets.
    pub tables: Tables,
    /// Where they come from.
    pub measured: Vec<Measured>,
}

#[derive(Deserialize)]
struct Raw {
    schema: u64,
    minor: String,
    flavour: Flavour,
    patches: String,
    beyond: Beyond,
    meaning: Meaning,
    debug_offsets: Option<DebugOffsetsShape>,
    measured: Vec<Measured>,
    // What is left must be tables of unsigned integers: a misspelt key above ends up here and fails to parse; misspelt
    // tables and fields are `check::unknown_name`'s.
    #[serde(flatten)]
    tables: BTreeMap<String, BTreeMap<String, u64>>,
}

impl LayoutFile {
    /// Parses `text`; `name` is for messages.
    pub fn parse(name: &str, text: &str) -> Result<Self, LayoutError> {
        let wrong = |what: String| LayoutError::File { file: name.to_owned(), what };
        let raw: Raw = toml::from_str(text).map_err(|e| wrong(e.to_string()))?;
        if !SCHEMAS.contains(&raw.schema) {
            let (first, last) = (SCHEMAS.start(), SCHEMAS.end());
            return Err(wrong(format!(
                "schema {} is not known (this build reads {first} to {last})",
                raw.schema
            )));
        }
        let patches = raw
            .patches
            .split_once("..=")
            .and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)))
            .filter(|(a, b)| a <= b)
            .ok_or_else(|| wrong(format!("patches = {:?} is not FIRST..=LAST", raw.patches)))?;
        if raw.measured.is_empty() {
            return Err(wrong("nothing under [[measured]]".into()));
        }
        if let Some(name) = super::check::unknown_name(&raw.tables) {
            return Err(wrong(format!("{name} is no field that is known")));
        }
        Ok(Self {
            name: name.to_owned(),
            minor: raw.minor,
            flavour: raw.flavour,
            patches,
            beyond: raw.beyond,
            meaning: raw.meaning,
            debug_offsets: raw.debug_offsets,
            tables: raw.tables,
            measured: raw.measured,
        })
    }

    /// The layout for `version` from this file's offsets and `published` ones (which take precedence).
    pub fn build(&self, version: PythonVersion, published: Option<Tables>) -> Result<Layout, LayoutError> {
        let source = match published {
            Some(_) => "_Py_DebugOffsets".to_owned(),
            None => format!("cpython-layouts/{}", self.name),
        };
        let mut tables = self.tables.clone();
        for (table, keys) in published.unwrap_or_default() {
            tables.entry(table).or_default().extend(keys);
        }
        let unmeasured = if (self.patches.0..=self.patches.1).contains(&version.micro) {
            None
        } else if self.beyond == Beyond::Check {
            Some(format!(
                "measured on {}.{} to {}.{}",
                self.minor, self.patches.0, self.minor, self.patches.1
            ))
        } else {
            let (flavour, supported) =
                (self.flavour, format!("{}.{}..={}", self.minor, self.patches.0, self.patches.1));
            return Err(LayoutError::Unknown { version, flavour, supported });
        };
        let read = Reader { source: &source, version, tables: &tables };
        let layout = Layout {
            meaning: self.meaning,
            runtime_state: read.table("runtime_state")?,
            interpreter_state: read.table("interpreter_state")?,
            thread_state: read.table("thread_state")?,
            cframe: read.optional("cframe")?,
            frame_object: read.optional("frame_object")?,
            interpreter_frame: read.optional("interpreter_frame")?,
            code_object: read.table("code_object")?,
            pyobject: read.table("pyobject")?,
            type_object: read.table("type_object")?,
            heap_type_object: read.table("heap_type_object")?,
            bytes_object: read.table("bytes_object")?,
            unicode_object: read.table("unicode_object")?,
            long_object: read.table("long_object")?,
            dict_object: read.table("dict_object")?,
            dict_keys: read.table("dict_keys")?,
            dict_values: read.optional("dict_values")?,
            module_object: read.table("module_object")?,
            collector: read.optional("collector")?,
            gc: read.optional("gc")?,
            obmalloc: read.optional("obmalloc")?,
            arena_object: read.optional("arena_object")?,
            pool_header: read.optional("pool_header")?,
            unmeasured,
            source: source.clone(),
        };
        super::check::shape(&layout, &tables, version)?;
        Ok(layout)
    }
}

struct Reader<'a> {
    source: &'a str,
    version: PythonVersion,
    tables: &'a Tables,
}

impl Reader<'_> {
    fn optional<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, LayoutError> {
        let Some(keys) = self.tables.get(name) else { return Ok(None) };
        let table: toml::Table = keys
            .iter()
            .map(|(k, v)| (k.clone(), toml::Value::Integer(i64::try_from(*v).unwrap_or(i64::MAX))))
            .collect();
        table
            .try_into()
            .map(Some)
            .map_err(|e: toml::de::Error| self.wrong(format!("[{name}]: {}", e.message())))
    }

    fn table<T: DeserializeOwned>(&self, name: &str) -> Result<T, LayoutError> {
        self.optional(name)?.ok_or_else(|| self.wrong(format!("[{name}] is missing")))
    }

    fn wrong(&self, what: String) -> LayoutError {
        LayoutError::Shape { source_name: self.source.to_owned(), version: self.version, what }
    }
}

#[cfg(test)]
mod tests {
    use super::super::catalog;
    use super::*;

    fn text() -> &'static str {
        catalog::FILES.iter().find(|(name, _)| *name == "3.11.toml").unwrap().1
    }

    fn build(text: &str) -> Result<Layout, LayoutError> {
        LayoutFile::parse("test.toml", text)?.build(PythonVersion::parse("3.11.7").unwrap(), None)
    }

    /// `text` with its first `from` replaced; the replacement must happen.
    fn with(from: &str, to: &str) -> String {
        assert!(text().contains(from), "{from:?} is not in the file");
        text().replacen(from, to, 1)
    }

    #[test]
    fn the_file_itself_is_fine() {
        assert_eq!(build(text()).unwrap().thread_state.thread_id, 152);
    }

    #[test]
    fn wrong_files_are_errors_that_say_what() {
        let cases = [
            (with("schema = 3", "schema = 4"), "schema 4"),
            (with("patches = \"", "patches = \"x"), "FIRST..=LAST"),
            (with("thread_id = 152", "thread_id = -152"), "-152"),
            (with("thread_id = 152", "thread_id = 152\nthread_id = 152"), "duplicate"),
            (with("thread_id = 152", "thread_idd = 152"), "thread_state.thread_idd"),
            (with("thread_id = 152", ""), "thread_id"),
            (with("thread_id = 152", "thread_id = 153"), "not aligned"),
            (with("thread_id = 152", "thread_id = 160"), "overlaps"),
            (with("thread_id = 152", "thread_id = 360"), "outside"),
            (with("frame_chain = \"cframe\"", "frame_chain = \"chain\""), "chain"),
            (
                with("frame_chain = \"cframe\"", "frame_chain = \"current-frame\""),
                "thread_state.current_frame is missing",
            ),
            (with("[cframe]\ncurrent_frame = 8", ""), "cframe is missing"),
            (with("co_code_adaptive = 184", ""), "co_code_adaptive is missing"),
            (with("flavour =", "flavor ="), "flavo"),
        ];
        for (text, expected) in cases {
            let error = build(&text).expect_err(expected).to_string();
            assert!(error.contains(expected), "{expected:?} is not in: {error}");
        }
    }

    #[test]
    fn a_patch_release_that_was_not_measured_is_marked_or_refused() {
        let version = PythonVersion::parse("3.11.200").unwrap();
        let file = |text: &str| LayoutFile::parse("test.toml", text).unwrap();
        assert!(file(text()).build(version, None).unwrap().unmeasured.is_some());
        let refusing = with("beyond = \"check\"", "beyond = \"refuse\"");
        assert!(matches!(file(&refusing).build(version, None), Err(LayoutError::Unknown { .. })));
    }
}
