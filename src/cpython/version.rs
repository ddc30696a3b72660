//! Which CPython a process is: version, flavour, and how each was learnt.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Where in its life a release is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub enum ReleaseLevel {
    /// `a`.
    Alpha,
    /// `b`.
    Beta,
    /// `rc`.
    Candidate,
    /// A release.
    Final,
}

/// A CPython version, `sys.version_info`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
pub struct PythonVersion {
    /// 3.
    pub major: u8,
    /// The second number.
    pub minor: u8,
    /// The third number.
    pub micro: u8,
    /// Alpha to final.
    pub level: ReleaseLevel,
    /// Number within the level.
    pub serial: u8,
}

impl PythonVersion {
    /// Oldest minor version of 3 that is supported.
    pub const OLDEST: u8 = 8;
    /// Newest minor version of 3 that is supported.
    pub const NEWEST: u8 = 15;

    /// From `PY_VERSION_HEX` (`sys.hexversion`).
    pub fn from_hex(hex: u32) -> Self {
        let level = match hex >> 4 & 0xf {
            0xa => ReleaseLevel::Alpha,
            0xb => ReleaseLevel::Beta,
            0xc => ReleaseLevel::Candidate,
            _ => ReleaseLevel::Final,
        };
        let byte = |shift: u32| (hex >> shift & 0xff) as u8;
        Self { major: byte(24), minor: byte(16), micro: byte(8), level, serial: (hex & 0xf) as u8 }
    }

    /// From `PY_VERSION`: `3.9.18`, `3.13.0rc2`, `3.10.2+`.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.strip_suffix('+').unwrap_or(text);
        let mut parts = text.splitn(3, '.');
        let (major, minor, rest) = (parts.next()?, parts.next()?, parts.next()?);
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (micro, suffix) = rest.split_at(digits);
        let levels = [("rc", ReleaseLevel::Candidate), ("a", ReleaseLevel::Alpha), ("b", ReleaseLevel::Beta)];
        let (level, serial) = match levels.iter().find_map(|(p, l)| Some((*l, suffix.strip_prefix(p)?))) {
            Some((level, serial)) => (level, serial.parse().ok()?),
            None if suffix.is_empty() => (ReleaseLevel::Final, 0),
            None => return None,
        };
        Some(Self {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
            micro: micro.parse().ok()?,
            level,
            serial,
        })
    }

    /// True for 3.8 to 3.15.
    pub fn is_supported(&self) -> bool {
        self.major == 3 && (Self::OLDEST..=Self::NEWEST).contains(&self.minor)
    }
}

impl fmt::Display for PythonVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)?;
        match self.level {
            ReleaseLevel::Alpha => write!(f, "a{}", self.serial),
            ReleaseLevel::Beta => write!(f, "b{}", self.serial),
            ReleaseLevel::Candidate => write!(f, "rc{}", self.serial),
            ReleaseLevel::Final => Ok(()),
        }
    }
}

/// How CPython was configured, as far as its structures depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Flavour {
    /// With the GIL.
    Default,
    /// `--disable-gil` (3.13t and later).
    FreeThreaded,
    /// `--with-pydebug`.
    Debug,
}

impl fmt::Display for Flavour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Default => "default build",
            Self::FreeThreaded => "free-threaded build",
            Self::Debug => "debug build",
        })
    }
}

/// How a fact about the process was learnt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Evidence {
    /// The fact: `version`, `flavour`, `runtime`, `own thread state`.
    pub fact: &'static str,
    /// Its value in words.
    pub value: String,
    /// Where it was found.
    pub source: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hex_and_text_give_the_same_version() {
        for (hex, text) in [(0x030b_07f0, "3.11.7"), (0x030d_00c2, "3.13.0rc2"), (0x030f_00a1, "3.15.0a1")] {
            assert_eq!(PythonVersion::from_hex(hex), PythonVersion::parse(text).unwrap());
            assert_eq!(PythonVersion::from_hex(hex).to_string(), text);
        }
        assert_eq!(PythonVersion::parse("3.9.2+"), PythonVersion::parse("3.9.2"));
        for wrong in ["3.9", "3.9.x", "3.9.1.2", "3.9.300", ""] {
            assert_eq!(PythonVersion::parse(wrong), None, "{wrong}");
        }
    }
}
