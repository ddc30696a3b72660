//! Moments as people write them: `start`, `first`, `last`, `17`, `+30m`, `-5m`, `10:00`, `2026-11-21T10:00:00Z`.

use super::parse::parse_duration;
use crate::analysis::When;
use std::time::UNIX_EPOCH;

/// Reads a moment.
pub(super) fn parse_when(text: &str) -> Result<When, String> {
    let ns = |duration: std::time::Duration| u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
    match text {
        "start" => return Ok(When::Start),
        "first" => return Ok(When::First),
        "last" | "end" => return Ok(When::Last),
        _ => {}
    }
    if let Some(offset) = text.strip_prefix('+') {
        return parse_duration(offset).map(|offset| When::AfterStart(ns(offset)));
    }
    if let Some(offset) = text.strip_prefix('-') {
        return parse_duration(offset).map(|offset| When::BeforeEnd(ns(offset)));
    }
    if let Ok(index) = text.trim_start_matches('#').parse() {
        return Ok(When::Index(index));
    }
    if let Ok(time) = humantime::parse_rfc3339_weak(text)
        && let Ok(since) = time.duration_since(UNIX_EPOCH)
    {
        return Ok(When::Unix(ns(since)));
    }
    of_day(text).ok_or_else(|| {
        format!(
            "`{text}` is no moment: write start, first, last, a snapshot's number, +30m (after the start), -5m (before the \
             end), 10:00 or 2026-11-21T10:00:00Z (UTC)"
        )
    })
}

/// `10:00`, `10:00:30`.
fn of_day(text: &str) -> Option<When> {
    let parts: Vec<u64> = text.split(':').map(|part| part.parse().ok()).collect::<Option<_>>()?;
    let (hours, minutes, seconds) = match parts[..] {
        [hours, minutes] => (hours, minutes, 0),
        [hours, minutes, seconds] => (hours, minutes, seconds),
        _ => return None,
    };
    let possible = hours < 24 && minutes < 60 && seconds < 60;
    possible.then_some(When::OfDay((hours * 3600 + minutes * 60 + seconds) * 1_000_000_000))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_read_as_people_write_them() {
        const MINUTE: u64 = 60_000_000_000;
        let cases = [
            ("start", When::Start),
            ("first", When::First),
            ("last", When::Last),
            ("17", When::Index(17)),
            ("#17", When::Index(17)),
            ("+30m", When::AfterStart(30 * MINUTE)),
            ("-5m", When::BeforeEnd(5 * MINUTE)),
            ("10:00", When::OfDay(600 * MINUTE)),
            ("00:01:30", When::OfDay(MINUTE * 3 / 2)),
            ("1970-01-01T00:01:00Z", When::Unix(MINUTE)),
            ("1970-01-01 00:01:00", When::Unix(MINUTE)),
        ];
        for (text, expected) in cases {
            assert_eq!(parse_when(text), Ok(expected), "{text}");
        }
        for bad in
            ["", "yesterday", "25:00", "10:60", "1:2:3:4", "+", "+3 parsecs", "-", "1.5", "99999999999"]
        {
            assert!(parse_when(bad).is_err(), "{bad}");
        }
    }
}
