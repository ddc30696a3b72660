//! `leaks` of a folder: each process judged by itself, for each has a heap of its own, and then what several of them have in
//! common.
//!
//! Reports come one after the other, so that one capture at a time is in memory.

use super::diff::label;
use super::leaks::{HOUR, LeaksReport, signed};
use super::text::counted;
use super::{ReportError, text, write_json};
use crate::analysis::{GroupName, Verdict};
use serde::Serialize;
use std::collections::BTreeMap;
use std::io::Write;

/// See the module.
pub struct LeaksOfFolder<'a> {
    out: &'a mut dyn Write,
    json: bool,
    processes: u64,
    together: BTreeMap<GroupName, Together>,
}

/// A line that leaks, over all processes.
#[derive(Clone, Copy, Default)]
struct Together {
    processes: u64,
    rate: f64,
    growth: f64,
}

#[derive(Serialize)]
struct Common<'a> {
    function: Option<&'a str>,
    file: Option<&'a str>,
    line: Option<u32>,
    processes: u64,
    growth_bytes: i64,
    bytes_per_hour: f64,
}

impl<'a> LeaksOfFolder<'a> {
    /// Begins with no process.
    pub fn begin(json: bool, out: &'a mut dyn Write) -> Result<Self, ReportError> {
        if json {
            write!(out, "{{\n\"report\": \"leaks\",\n\"processes\": [\n")?;
        }
        Ok(Self { out, json, processes: 0, together: BTreeMap::new() })
    }

    /// The next process.
    pub fn add(&mut self, report: &LeaksReport<'_>) -> Result<(), ReportError> {
        if self.processes > 0 {
            writeln!(self.out, "{}", if self.json { "," } else { "" })?;
        }
        report.write(self.json, self.out)?;
        self.processes += 1;
        for site in report.leaks.sites.iter().filter(|site| site.verdict == Verdict::Leak) {
            let sum = self.together.entry(site.name.clone()).or_default();
            sum.processes += 1;
            sum.rate += site.rate.value;
            sum.growth += site.growth.0;
        }
        Ok(())
    }

    /// How many processes there were; ends with what they have in common.
    pub fn finish(self) -> Result<u64, ReportError> {
        let mut together: Vec<(GroupName, Together)> = self.together.into_iter().collect();
        together.sort_by(|(_, a), (_, b)| b.rate.total_cmp(&a.rate));
        if self.json {
            write!(self.out, "],\n\"leaks_of_all\": ")?;
            let common = |(name, sum): &'_ (GroupName, Together)| -> Result<String, ReportError> {
                let mut line = Vec::new();
                write_json(&Common::of(name, sum), &mut line)?;
                Ok(String::from_utf8_lossy(&line).trim_end().to_owned())
            };
            let lines = together.iter().map(common).collect::<Result<Vec<_>, _>>()?;
            writeln!(self.out, "[{}]\n}}", lines.join(",\n"))?;
            return Ok(self.processes);
        }
        writeln!(self.out, "\nLeaks of all {}:", counted(self.processes, "capture"))?;
        if together.is_empty() {
            writeln!(self.out, "  none")?;
        }
        for (name, sum) in &together {
            writeln!(
                self.out,
                "  {}: in {} of {}, {}/h together, grew by {}",
                label(name),
                text::number(sum.processes),
                text::number(self.processes),
                signed(sum.rate * HOUR),
                signed(sum.growth)
            )?;
        }
        Ok(self.processes)
    }
}

impl<'a> Common<'a> {
    fn of(name: &'a GroupName, sum: &Together) -> Self {
        Self {
            function: name.function.as_deref(),
            file: name.file.as_deref(),
            line: name.line,
            processes: sum.processes,
            growth_bytes: sum.growth as i64,
            bytes_per_hour: (sum.rate * HOUR).round(),
        }
    }
}
