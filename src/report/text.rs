//! Numbers and names for people: sizes, shares, times; and names made harmless.
//!
//! Knows nothing of captures.

use std::borrow::Cow;
use std::fmt::Write;

/// True for characters that could move a cursor, change colours or reorder text on a terminal.
fn is_dangerous(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

/// `text` with such characters shown as escapes (`\x1b`, `\u{202e}`).
pub fn escaped(text: &str) -> Cow<'_, str> {
    if !text.contains(is_dangerous) {
        return Cow::Borrowed(text);
    }
    let mut safe = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        match c {
            '\n' => safe.push_str("\\n"),
            '\t' => safe.push_str("\\t"),
            '\r' => safe.push_str("\\r"),
            c if is_dangerous(c) && u32::from(c) < 0x100 => {
                let _ = write!(safe, "\\x{:02x}", u32::from(c));
            }
            c if is_dangerous(c) => safe.extend(c.escape_unicode()),
            c => safe.push(c),
        }
    }
    Cow::Owned(safe)
}

/// JSON whose strings hold no character that a terminal would obey: serde escapes those below 0x20,
/// this the others. They occur in strings only, where `\u` means the same.
pub fn terminal_safe_json(json: &str) -> Cow<'_, str> {
    let raw = |c: char| is_dangerous(c) && c != '\n';
    if !json.contains(raw) {
        return Cow::Borrowed(json);
    }
    let mut safe = String::with_capacity(json.len() + 8);
    for c in json.chars() {
        if raw(c) {
            let _ = write!(safe, "\\u{:04x}", u32::from(c));
        } else {
            safe.push(c);
        }
    }
    Cow::Owned(safe)
}

/// `1536` as `1.5 KiB`.
pub fn size(bytes: u64) -> String {
    match unit(bytes) {
        None => format!("{bytes} B"),
        Some((unit, name)) => format!("{:.1} {name}", bytes as f64 / unit),
    }
}

/// `1536` and `100.0` as `1.5 KiB ±0.1`: the error is in the unit of the size. `±0` says that there is none at all.
pub fn size_and_error(bytes: u64, error: f64) -> String {
    match unit(bytes) {
        _ if error == 0.0 => format!("{} ±0", size(bytes)),
        None => format!("{bytes} B ±{error:.0}"),
        Some((unit, _)) => format!("{} ±{:.1}", size(bytes), error / unit),
    }
}

/// What so many bytes are counted in; `None` for single bytes.
fn unit(bytes: u64) -> Option<(f64, &'static str)> {
    const NAMES: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return None;
    }
    let (mut unit, mut at) = (1024.0, 0);
    // 1023.95 would be printed as 1024.0 of the smaller unit.
    while bytes as f64 / unit >= 1023.95 && at + 1 < NAMES.len() {
        unit *= 1024.0;
        at += 1;
    }
    Some((unit, NAMES[at]))
}

/// `part` of `whole` as `12.3%`.
pub fn share(part: u64, whole: u64) -> String {
    format!("{:.1}%", percent(part, whole))
}

/// `part` of `whole` in percent; 0 of nothing.
pub fn percent(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 * 100.0 / whole as f64 }
}

/// `1234567` as `1,234,567`.
pub fn number(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `1 allocation`, `2 allocations`.
pub fn counted(count: u64, what: &str) -> String {
    format!("{} {}", number(count), plural(count, what))
}

/// `allocation` for one of them, `allocations` for more.
pub fn plural(count: u64, what: &str) -> String {
    format!("{what}{}", if count == 1 { "" } else { "s" })
}

/// A span of time: `12.3 s`, `4 min 5 s`, `2 h 3 min`.
pub fn duration(ns: u64) -> String {
    let seconds = ns / 1_000_000_000;
    match seconds {
        0..=9 => format!("{:.3} s", ns as f64 / 1e9),
        10..=119 => format!("{:.1} s", ns as f64 / 1e9),
        120..=7199 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
    }
}

/// A wall-clock time in UTC, to the second.
pub fn timestamp(unix_ns: u64) -> String {
    let time = std::time::UNIX_EPOCH + std::time::Duration::from_nanos(unix_ns);
    humantime::format_rfc3339_seconds(time).to_string()
}

/// `text` in `width` characters, its middle left out if it is longer: a location's ends say most.
pub fn fitted(text: &str, width: usize) -> Cow<'_, str> {
    let len = text.chars().count();
    if len <= width {
        return Cow::Borrowed(text);
    }
    let kept = width.saturating_sub(1);
    let head = kept / 2;
    let tail = kept - head;
    let start: String = text.chars().take(head).collect();
    let end: String = text.chars().skip(len - tail).collect();
    Cow::Owned(format!("{start}…{end}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_have_binary_units_and_one_decimal() {
        let cases = [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            (1024 * 1024 - 1, "1.0 MiB"),
            (5 << 40, "5.0 TiB"),
            (u64::MAX, "16.0 EiB"),
        ];
        for (bytes, expected) in cases {
            assert_eq!(size(bytes), expected);
        }
    }

    #[test]
    fn an_error_has_the_unit_of_its_size() {
        let cases = [
            (0, 0.0, "0 B ±0"),
            (700, 12.4, "700 B ±12"),
            (1536, 100.0, "1.5 KiB ±0.1"),
            (12 << 20, 838_861.0, "12.0 MiB ±0.8"),
            (512 << 10, 3e6, "512.0 KiB ±2929.7"),
            (1 << 30, 1.0, "1.0 GiB ±0.0"),
            (1 << 30, 0.0, "1.0 GiB ±0"),
        ];
        for (bytes, error, expected) in cases {
            assert_eq!(size_and_error(bytes, error), expected);
        }
    }

    #[test]
    fn other_numbers_are_readable() {
        assert_eq!(
            [number(0), number(999), number(1000), number(1234567)],
            ["0", "999", "1,000", "1,234,567"]
        );
        assert_eq!([duration(1_500_000_000), duration(125_000_000_000)], ["1.500 s", "2 min 5 s"]);
        assert_eq!(share(1, 3), "33.3%");
        assert_eq!(share(1, 0), "0.0%");
        assert_eq!(timestamp(1_700_000_000_000_000_000), "2023-11-14T22:13:20Z");
        assert_eq!(timestamp(u64::MAX), "2554-07-21T23:34:33Z");
        assert_eq!(fitted("abcdefghij", 5), "ab…ij");
    }

    proptest! {
        #[test]
        fn nothing_dangerous_is_left(text in any::<String>()) {
            prop_assert!(!escaped(&text).contains(is_dangerous));
            let json = serde_json::to_string(&text).unwrap();
            let safe = terminal_safe_json(&json);
            prop_assert!(!safe.contains(|c: char| is_dangerous(c)));
            prop_assert_eq!(serde_json::from_str::<String>(&safe).unwrap(), text);
        }

        #[test]
        fn fitted_text_fits(text in ".{0,40}", width in 1usize..30) {
            prop_assert!(fitted(&text, width).chars().count() <= width);
        }
    }

    #[test]
    fn escapes_are_visible() {
        assert_eq!(escaped("a\x1b[31mb\n\u{202e}"), "a\\x1b[31mb\\n\\u{202e}");
    }
}
