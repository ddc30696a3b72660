//! Arguments as people write them.

use std::time::Duration;

/// Reads the id of a process.
pub fn parse_pid(text: &str) -> Result<i32, String> {
    match text.parse::<i64>() {
        Ok(pid @ 1..=0x7fff_ffff) => Ok(pid as i32),
        Ok(_) => Err("no process has such an id: it is a number from 1 up".to_string()),
        Err(_) => Err("a process is given by its number, as `pgrep -af python` shows it".to_string()),
    }
}

/// Reads `30`, `30s`, `500ms`, `5m`, `1h`.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor = match unit.trim() {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        other => return Err(format!("`{other}` is no unit of time: use ms, s, m or h, as in 30s")),
    };
    let number: f64 = number.parse().map_err(|_| format!("`{text}` is no time: write 30s, 5m or 1h"))?;
    let seconds = number * factor;
    if !(0.001..=1e9).contains(&seconds) {
        return Err(format!("`{text}` is out of range"));
    }
    Ok(Duration::from_secs_f64(seconds))
}

/// Reads `512KiB`, `1MiB`, `4096`: a number of bytes, at least 1 and below 2^40.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        other => return Err(format!("`{other}` is no unit of size: use KiB, MiB or GiB, as in 512KiB")),
    };
    let number: f64 = number.parse().map_err(|_| format!("`{text}` is no size: write 512KiB or 1MiB"))?;
    let bytes = number * factor as f64;
    if !(1.0..(1_u64 << 40) as f64).contains(&bytes) {
        return Err(format!("`{text}` is out of range"));
    }
    Ok(bytes as u64)
}

/// Reads a percentage: `2`, `0.5%`.
pub fn parse_percent(text: &str) -> Result<f64, String> {
    let number = text.strip_suffix('%').unwrap_or(text).trim();
    match number.parse::<f64>() {
        Ok(percent) if percent > 0.0 && percent <= 100.0 => Ok(percent),
        _ => Err(format!("`{text}` is no percentage above 0 and up to 100, such as 2")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pid_is_a_positive_number() {
        assert_eq!(parse_pid("1234"), Ok(1234));
        for bad in ["0", "-1", "2147483648", "99999999999999999999", "", "python", "12 "] {
            assert!(parse_pid(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_and_percentages_are_read_as_people_write_them() {
        assert_eq!(parse_size("512KiB"), Ok(512 << 10));
        assert_eq!(parse_size("1.5MiB"), Ok(3 << 19));
        assert_eq!(parse_size("64kb"), Ok(64_000));
        assert_eq!(parse_size("4096"), Ok(4096));
        for bad in ["", "0", "KiB", "1 mile", "-1", "2000000GiB", "nan"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
        assert_eq!(parse_percent("2"), Ok(2.0));
        assert_eq!(parse_percent("0.5%"), Ok(0.5));
        for bad in ["", "0", "101", "-1", "%", "NaN"] {
            assert!(parse_percent(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn times_are_read_in_the_units_people_write() {
        assert_eq!(parse_duration("30"), Ok(Duration::from_secs(30)));
        assert_eq!(parse_duration("1.5m"), Ok(Duration::from_secs(90)));
        assert_eq!(parse_duration("250ms"), Ok(Duration::from_millis(250)));
        for bad in ["", "s", "0", "5 parsecs", "-1s", "1e400h"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }
}
