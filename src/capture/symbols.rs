//! Symbols chunks: what native frames are called, there and back (the bytes are drawn in `format`).
//!
//! Pure. Nothing that the bytes say is believed; what a reader holds grows with the bytes read, up to a bound.

use super::format::{CHUNK_TARGET_LEN, MAX_NAME_LEN, MAX_PLACES};
use super::intern::cut;
use super::native::{ModuleId, NativeFrame, NativePlace};
use super::varint::{Cursor, put, unzigzag, zigzag};
use foldhash::fast::RandomState;
use std::borrow::Cow;
use std::collections::HashMap;

/// The most bytes of numbers that a frame, or one of its places, takes.
const NUMBERS_LEN: usize = 30;
/// What a reader holds of a file: so many strings, places and frames each, and so many bytes of text. No program has as many.
const MOST: usize = 1 << 22;
const MOST_TEXT: usize = 256 << 20;
const TOO_MANY: &str = "there are too many symbols";

/// Hands the contents of as many chunks as it takes to `write`.
pub(super) fn encode<E>(
    named: &[(NativeFrame, Vec<NativePlace>)],
    mut write: impl FnMut(&[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let mut chunk = Chunk::default();
    for (frame, places) in named {
        let places = &places[..places.len().min(MAX_PLACES)];
        let place_len = |place: &NativePlace| {
            let name = |name: &Option<String>| name.as_ref().map_or(0, |name| name.len().min(MAX_NAME_LEN));
            name(&place.function) + name(&place.file) + 2 * NUMBERS_LEN
        };
        let len = NUMBERS_LEN + places.iter().map(place_len).sum::<usize>();
        if chunk.frames > 0 && chunk.len() + len > CHUNK_TARGET_LEN {
            write(&std::mem::take(&mut chunk).content())?;
        }
        chunk.add(*frame, places);
    }
    if chunk.frames > 0 { write(&chunk.content()) } else { Ok(()) }
}

/// A chunk in the making.
#[derive(Default)]
struct Chunk<'a> {
    strings: HashMap<Cow<'a, str>, u64, RandomState>,
    text: Vec<u8>,
    frames: usize,
    body: Vec<u8>,
    last_address: u64,
}

impl<'a> Chunk<'a> {
    fn len(&self) -> usize {
        self.text.len() + self.body.len() + NUMBERS_LEN
    }

    fn add(&mut self, frame: NativeFrame, places: &'a [NativePlace]) {
        put(&mut self.body, frame.module.map_or(0, |module| u64::from(module.0) + 1));
        put(&mut self.body, zigzag(frame.address.wrapping_sub(self.last_address) as i64));
        put(&mut self.body, places.len() as u64);
        for place in places {
            for name in [&place.function, &place.file] {
                let number = name.as_deref().map_or(0, |name| self.string(name) + 1);
                put(&mut self.body, number);
            }
            put(&mut self.body, u64::from(place.line.unwrap_or(0)));
        }
        self.last_address = frame.address;
        self.frames += 1;
    }

    fn string(&mut self, text: &'a str) -> u64 {
        let text = cut(text, MAX_NAME_LEN);
        let next = self.strings.len() as u64;
        if let Some(known) = self.strings.get(&text) {
            return *known;
        }
        put(&mut self.text, text.len() as u64);
        self.text.extend_from_slice(text.as_bytes());
        self.strings.insert(text, next);
        next
    }

    fn content(self) -> Vec<u8> {
        let mut content = Vec::with_capacity(self.len());
        put(&mut content, self.strings.len() as u64);
        content.extend_from_slice(&self.text);
        put(&mut content, self.frames as u64);
        content.extend_from_slice(&self.body);
        content
    }
}

/// A place in words, as it was told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct PlaceText<'a> {
    pub(super) function: Option<&'a str>,
    pub(super) file: Option<&'a str>,
    /// 0 if unknown.
    pub(super) line: u32,
}

impl<'a> PlaceText<'a> {
    pub(super) fn of(place: &'a NativePlace) -> Self {
        let NativePlace { function, file, line } = place;
        Self { function: function.as_deref(), file: file.as_deref(), line: line.unwrap_or(0) }
    }
}

/// All that the symbols chunks of a file tell.
#[derive(Default)]
pub(super) struct Symbols {
    text: String,
    /// Start in `text` and length.
    strings: Vec<(usize, usize)>,
    places: Vec<Place>,
    /// First in `places`, and how many.
    frames: HashMap<(Option<ModuleId>, u64), (usize, usize), RandomState>,
}

struct Place {
    function: Option<u32>,
    file: Option<u32>,
    line: u32,
}

impl Symbols {
    /// Takes the content of a chunk. What comes before an error is kept.
    pub(super) fn take(&mut self, raw: &[u8]) -> Result<(), &'static str> {
        const ENDED: &str = "a symbol is cut or holds an overlong number";
        let mut cursor = Cursor::new(raw, 0);
        let first = u32::try_from(self.strings.len()).map_err(|_| TOO_MANY)?;
        let strings = cursor.varint_u32().ok_or(ENDED)?;
        for _ in 0..strings {
            let len = cursor.varint().ok_or(ENDED)?;
            let text = std::str::from_utf8(cursor.take(len).ok_or(ENDED)?);
            let text = text.map_err(|_| "a symbol is not UTF-8")?;
            if self.strings.len() == MOST || self.text.len() + text.len() > MOST_TEXT {
                return Err(TOO_MANY);
            }
            self.strings.push((self.text.len(), text.len()));
            self.text.push_str(text);
        }
        let mut address = 0_u64;
        for _ in 0..cursor.varint().ok_or(ENDED)? {
            let module = cursor.varint_u32().ok_or(ENDED)?.checked_sub(1).map(ModuleId);
            address = address.wrapping_add(cursor.varint().map(unzigzag).ok_or(ENDED)? as u64);
            let count = cursor.varint().ok_or(ENDED)?;
            if count > MAX_PLACES as u64 {
                return Err("a native frame has too many places");
            }
            let start = self.places.len();
            if start + MAX_PLACES > MOST || self.frames.len() == MOST {
                return Err(TOO_MANY);
            }
            for _ in 0..count {
                let mut name = || match cursor.varint_u32().ok_or(ENDED)?.checked_sub(1) {
                    Some(name) if name >= strings => Err("a symbol that is not in its chunk is named"),
                    name => Ok(name.map(|name| first.saturating_add(name))),
                };
                let (function, file) = (name()?, name()?);
                let line = cursor.varint_u32().ok_or(ENDED)?;
                self.places.push(Place { function, file, line });
            }
            self.frames.insert((module, address), (start, count as usize));
        }
        Ok(())
    }

    /// The places of a frame, innermost first; `None` if no chunk has it.
    pub(super) fn places(&self, frame: NativeFrame) -> Option<Vec<PlaceText<'_>>> {
        let (start, count) = *self.frames.get(&frame.place())?;
        let name = |name: u32| self.strings.get(name as usize).map(|(at, len)| &self.text[*at..at + len]);
        let place = |place: &Place| PlaceText {
            function: place.function.and_then(name),
            file: place.file.and_then(name),
            line: place.line,
        };
        Some(self.places[start..start + count].iter().map(place).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::format::MAX_RAW_LEN;
    use proptest::prelude::*;

    fn frame(module: Option<u32>, address: u64) -> NativeFrame {
        NativeFrame::new(module.map(ModuleId), address, 0)
    }

    fn place(function: Option<&str>, file: Option<&str>, line: u32) -> NativePlace {
        NativePlace {
            function: function.map(str::to_owned),
            file: file.map(str::to_owned),
            line: Some(line).filter(|line| *line > 0),
        }
    }

    fn chunks(named: &[(NativeFrame, Vec<NativePlace>)]) -> Vec<Vec<u8>> {
        let mut chunks = Vec::new();
        let encoded: Result<(), std::convert::Infallible> = encode(named, |content| {
            chunks.push(content.to_vec());
            Ok(())
        });
        let Ok(()) = encoded;
        chunks
    }

    fn read(chunks: &[Vec<u8>]) -> Symbols {
        let mut symbols = Symbols::default();
        chunks.iter().for_each(|chunk| symbols.take(chunk).unwrap());
        symbols
    }

    fn told(symbols: &Symbols, frame: NativeFrame) -> Option<Vec<NativePlace>> {
        let places = symbols.places(frame)?;
        Some(places.into_iter().map(|text| place(text.function, text.file, text.line)).collect())
    }

    fn any_named() -> impl Strategy<Value = (NativeFrame, Vec<NativePlace>)> {
        let name = || prop::option::of(prop::sample::select(vec!["f", "g<int>", "π", "", "/src/a.c"]));
        let places = prop::collection::vec((name(), name(), 0u32..50), 0..4);
        (prop::option::of(0u32..3), any::<u64>(), places).prop_map(|(module, address, places)| {
            (frame(module, address), places.into_iter().map(|(f, file, line)| place(f, file, line)).collect())
        })
    }

    proptest! {
        #[test]
        fn names_go_there_and_back(named in prop::collection::vec(any_named(), 0..60)) {
            let symbols = read(&chunks(&named));
            let last: HashMap<_, _> = named.iter().map(|(frame, places)| (*frame, places.clone())).collect();
            for (frame, places) in last {
                prop_assert_eq!(told(&symbols, frame), Some(places));
            }
            prop_assert!(symbols.places(frame(Some(7), 1)).is_none());
        }

        #[test]
        fn any_bytes_are_survived(raw in prop::collection::vec(prop_oneof![any::<u8>(), 0u8..5], 0..300)) {
            let mut symbols = Symbols::default();
            let _ = symbols.take(&raw);
            prop_assert!(symbols.places.len() + symbols.strings.len() <= raw.len());
            for (module, address) in symbols.frames.keys() {
                let _ = symbols.places(frame(module.map(|module| module.0), *address));
            }
        }
    }

    #[test]
    fn a_reader_holds_no_more_than_a_bound() {
        let mut symbols = Symbols::default();
        // Empty strings: a byte each.
        let mut strings = Vec::new();
        put(&mut strings, 1 << 20);
        strings.extend(vec![0; (1 << 20) + 1]);
        let taken = (0..8).map(|_| symbols.take(&strings)).filter(Result::is_ok).count();
        assert_eq!((taken, symbols.strings.len()), (4, MOST));
        // Frames of 64 places, three bytes each.
        let mut frames = vec![0];
        put(&mut frames, 5000);
        for _ in 0..5000 {
            frames.extend([1, 2, MAX_PLACES as u8]);
            frames.extend([0; 3 * MAX_PLACES]);
        }
        let taken = (0..20).map(|_| symbols.take(&frames)).filter(Result::is_ok).count();
        assert!(taken == MOST / (5000 * MAX_PLACES) && symbols.places.len() <= MOST, "{taken}");
    }

    #[test]
    fn more_than_a_chunk_holds_becomes_several_and_the_longest_frame_fits() {
        let long = |n: u64| format!("{n:04}{}", "x".repeat(3 * MAX_NAME_LEN));
        let named: Vec<_> = (0..12)
            .map(|n| {
                let one = |i| place(Some(&long(n * 1000 + i)), Some(&long(n * 1000 + 500 + i)), 7);
                (frame(Some(0), n), (0..200).map(one).collect())
            })
            .collect();
        let chunks = chunks(&named);
        assert!(chunks.len() > 1 && chunks.iter().all(|chunk| chunk.len() <= MAX_RAW_LEN));
        let symbols = read(&chunks);
        for (frame, _) in &named {
            let places = symbols.places(*frame).unwrap();
            assert_eq!(places.len(), MAX_PLACES);
            assert!(places.iter().all(|place| place.function.unwrap().len() <= MAX_NAME_LEN));
        }
    }
}
