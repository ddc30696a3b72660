//! `leaks` of a folder: each process judged by itself, for each has a heap of its own, and in the text then what several of them have
//! in common. As JSON it is one list of the sites of all.
//!
//! Reports come one after the other, so that one capture at a time is in memory.

use super::diff::label;
use super::leaks::{HOUR, LeaksReport, signed};
use super::text::counted;
use super::{ReportError, text};
use crate::analysis::{GroupName, Verdict};
use std::collections::BTreeMap;
use std::io::Write;

/// See the module.
pub struct LeaksOfFolder<'a> {
    out: &'a mut dyn Write,
    json: bool,
    processes: u64,
    /// Of the JSON list: it has elements.
    any: bool,
    together: BTreeMap<GroupName, Together>,
}

/// A line that leaks, over all processes.
#[derive(Clone, Copy, Default)]
struct Together {
    processes: u64,
    rate: f64,
    growth: f64,
}

impl<'a> LeaksOfFolder<'a> {
    /// Begins with no process.
    pub fn begin(json: bool, out: &'a mut dyn Write) -> Result<Self, ReportError> {
        if json {
            write!(out, "[")?;
        }
        Ok(Self { out, json, processes: 0, any: false, together: BTreeMap::new() })
    }

    /// The next process.
    pub fn add(&mut self, report: &LeaksReport<'_>) -> Result<(), ReportError> {
        self.processes += 1;
        if self.json {
            return report.write_elements(&mut self.any, self.out);
        }
        if self.processes > 1 {
            writeln!(self.out)?;
        }
        report.write(false, self.out)?;
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
        if self.json {
            writeln!(self.out, "\n]")?;
            return Ok(self.processes);
        }
        let mut together: Vec<(GroupName, Together)> = self.together.into_iter().collect();
        together.sort_by(|(_, a), (_, b)| b.rate.total_cmp(&a.rate));
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
