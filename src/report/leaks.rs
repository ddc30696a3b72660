//! `leaks`: a verdict per allocation site, with its evidence in one line.

use super::diff::label;
use super::facts::{warnings, write_run};
use super::figures::{Figures, is_false};
use super::names::NativeCode;
use super::text::{counted, duration, size};
use super::{ReportError, limited, text, write_rest};
use crate::analysis::{GroupName, Leaks, Outline, ProcessGrowth, SiteVerdict, TooLittle, Verdict};
use serde::Serialize;
use std::io::Write;

pub(super) const HOUR: f64 = 3600.0;

/// The report.
pub struct LeaksReport<'a> {
    /// The verdicts.
    pub leaks: &'a Leaks,
    /// The capture that they are of.
    pub outline: &'a Outline,
    /// The most sites; 0 for all.
    pub max_rows: usize,
}

/// One of the list that is the JSON form.
#[derive(Serialize)]
#[serde(untagged)]
enum Element<'a> {
    Site(Site<'a>),
    Process(Process),
}

/// The verdict on the whole process: it has no place.
#[derive(Serialize)]
struct Process {
    verdict: &'static str,
    function: Option<&'static str>,
    file: Option<&'static str>,
    line: Option<u32>,
    evidence: String,
    pid: u32,
    heap_free_bytes: Option<u64>,
    heap_in_use_bytes: Option<u64>,
}

#[derive(Serialize)]
struct Site<'a> {
    verdict: &'static str,
    function: Option<&'a str>,
    file: Option<&'a str>,
    line: Option<u32>,
    #[serde(flatten)]
    code: Option<NativeCode<'a>>,
    evidence: String,
    pid: u32,
    bytes: u64,
    count: u64,
    most_bytes: u64,
    growth_bytes: i64,
    bytes_per_hour: f64,
    bytes_per_hour_low_95: f64,
    bytes_per_hour_high_95: f64,
    /// Of what is resident.
    #[serde(skip_serializing_if = "Option::is_none")]
    share_of_resident_growth: Option<f64>,
    old_share: Option<f64>,
    old_seconds: u64,
    first_seen_ns: u64,
    moments: usize,
    #[serde(skip_serializing_if = "is_false")]
    incomplete: bool,
    #[serde(skip_serializing_if = "is_false")]
    estimated: bool,
    #[serde(flatten)]
    errors: Option<Errors>,
}

#[derive(Serialize)]
struct Errors {
    bytes_error_95: u64,
    growth_bytes_error_95: u64,
    samples: u64,
}

impl LeaksReport<'_> {
    /// Writes all of it, as text or as JSON: a list of sites.
    pub fn write(&self, json: bool, out: &mut dyn Write) -> Result<(), ReportError> {
        if !json {
            return self.text(limited(&self.leaks.sites, self.max_rows), out);
        }
        write!(out, "[")?;
        self.write_elements(&mut false, out)?;
        Ok(writeln!(out, "\n]")?)
    }

    fn figures(&self) -> Figures {
        Figures::of(&self.outline.findings)
    }

    fn text(&self, sites: &[SiteVerdict], out: &mut dyn Write) -> Result<(), ReportError> {
        write_run(&self.outline.findings, out)?;
        let of = |verdict| self.leaks.sites.iter().filter(|site| site.verdict == verdict).count() as u64;
        writeln!(
            out,
            "Judged by {}: {}, {} warming, {} sawtooth, {} footprint, {} without enough data",
            counted(self.leaks.moments as u64, "moment"),
            counted(of(Verdict::Leak), "leak"),
            of(Verdict::Warming),
            of(Verdict::Sawtooth),
            of(Verdict::Footprint),
            of(Verdict::NotEnoughData),
        )?;
        writeln!(out, "Process: {}", self.process_text())?;
        if sites.is_empty() {
            writeln!(out, "\nnothing to show")?;
        }
        for site in sites {
            let verdict = site.verdict.name().replace('_', " ");
            writeln!(out, "\n{verdict:15} {}", label(&site.name))?;
            writeln!(out, "{:15} {}", "", self.evidence(site))?;
        }
        write_rest(sites.len(), self.leaks.sites.len(), out)?;
        Ok(())
    }

    /// The elements of the JSON list, without its brackets; `any`: there are some already.
    pub(super) fn write_elements(&self, any: &mut bool, out: &mut dyn Write) -> Result<(), ReportError> {
        for site in limited(&self.leaks.sites, self.max_rows) {
            self.write_element(&Element::Site(self.site(site)), any, out)?;
        }
        let ProcessGrowth { heap_free, heap_in_use, fragmented, .. } = self.leaks.process;
        if fragmented == Some(true) {
            let process = Process {
                verdict: Verdict::Fragmentation.name(),
                function: None,
                file: None,
                line: None,
                evidence: self.process_text(),
                pid: self.outline.findings.header.pid,
                heap_free_bytes: heap_free,
                heap_in_use_bytes: heap_in_use,
            };
            self.write_element(&Element::Process(process), any, out)?;
        }
        Ok(())
    }

    fn write_element(
        &self,
        element: &Element<'_>,
        any: &mut bool,
        out: &mut dyn Write,
    ) -> Result<(), ReportError> {
        write!(out, "{}", if std::mem::replace(any, true) { ",\n" } else { "\n" })?;
        let json = serde_json::to_string_pretty(element)?;
        Ok(write!(out, "{}", text::terminal_safe_json(&json))?)
    }

    fn site<'s>(&'s self, site: &'s SiteVerdict) -> Site<'s> {
        let figures = self.figures();
        let GroupName { library, .. } = &site.name;
        let resident = self.leaks.process.resident_growth.filter(|grown| *grown > 0);
        let share = resident.map(|grown| thousandths(site.growth.0 / grown as f64));
        Site {
            verdict: site.verdict.name(),
            function: site.name.function.as_deref(),
            file: site.name.file.as_deref(),
            line: site.name.line,
            code: library.as_deref().map(NativeCode::of),
            evidence: self.evidence(site),
            pid: self.outline.findings.header.pid,
            bytes: site.live.bytes(),
            count: site.live.count(),
            most_bytes: site.most_bytes,
            growth_bytes: site.growth.0 as i64,
            bytes_per_hour: (site.rate.value * HOUR).round(),
            bytes_per_hour_low_95: (site.rate.low * HOUR).round(),
            bytes_per_hour_high_95: (site.rate.high * HOUR).round(),
            share_of_resident_growth: share.filter(|_| site.verdict == Verdict::Leak),
            old_share: site.old_share.map(thousandths),
            old_seconds: self.leaks.old_s,
            first_seen_ns: site.first_seen_ns,
            moments: self.leaks.moments,
            incomplete: !warnings(&self.outline.findings).is_empty(),
            estimated: figures.estimated,
            errors: figures.estimated.then(|| Errors {
                bytes_error_95: site.live.bytes_error().ceil() as u64,
                growth_bytes_error_95: site.growth.1.ceil() as u64,
                samples: site.live.samples(),
            }),
        }
    }

    /// What the verdict rests on, in one line.
    fn evidence(&self, site: &SiteVerdict) -> String {
        let figures = self.figures();
        let live = figures.amount(&site.live, "block");
        let growth = signed(site.growth.0);
        let growth = match figures.estimated {
            true => format!("{growth} ±{}", size(site.growth.1.ceil() as u64)),
            false => growth,
        };
        let per_hour = |rate: f64| signed(rate * HOUR);
        let rate = &site.rate;
        let rate =
            format!("{}/h ({} to {} at 95 %)", per_hour(rate.value), per_hour(rate.low), per_hour(rate.high));
        let first = format!("first seen {} after the start", duration(site.first_seen_ns));
        let old = match site.old_share {
            Some(share) => {
                let age = duration_s(self.leaks.old_s);
                format!("{:.0} % of it older than {age}, ", share * 100.0)
            }
            None => String::new(),
        };
        match site.verdict {
            Verdict::Leak => format!("{rate}; {live} live, {old}{first}"),
            Verdict::Warming => {
                format!(
                    "grew by {growth} and has slowed down to less than half or stopped; {live} live, {old}{first}"
                )
            }
            Verdict::Sawtooth => {
                format!("rises to {} and falls again; {live} live, {old}{first}", size(site.most_bytes))
            }
            Verdict::Footprint => format!("stable: {live} live, {old}{first}"),
            Verdict::NotEnoughData | Verdict::Fragmentation => {
                format!("{}; {growth} since then, {first}", self.why_not(site))
            }
        }
    }

    fn why_not(&self, site: &SiteVerdict) -> &'static str {
        match site.too_little {
            Some(TooLittle::Moments) => "seen at too few moments to judge",
            Some(TooLittle::Lately) => "it grew, but whether it goes on can't be told yet",
            Some(TooLittle::Bytes) => "grows by too little to matter",
            Some(TooLittle::Growth) | None => "growth can't be told from chance",
        }
    }

    fn process_text(&self) -> String {
        let process = &self.leaks.process;
        let mut text = match process.resident_growth {
            Some(grown) => {
                let leaks = signed(process.leaks_growth);
                let share = match grown {
                    1.. => format!(" ({:.0} %)", process.leaks_growth * 100.0 / grown as f64),
                    _ => String::new(),
                };
                let grown = signed(grown as f64);
                format!("its resident memory grew by {grown}, of which the leaks explain {leaks}{share}")
            }
            None => format!(
                "the leaks grew by {}; how much of the resident set's growth that explains is not known (no gauges in this \
                 capture)",
                signed(process.leaks_growth)
            ),
        };
        if let (Some(free), Some(used)) = (process.heap_free, process.heap_in_use) {
            let word = if process.fragmented == Some(true) { "fragmentation: " } else { "" };
            let share = free as f64 * 100.0 / (free as f64 + used as f64).max(1.0);
            text.push_str(&format!(
                "; {word}malloc holds {} that the program has freed ({share:.0} % of its heap)",
                size(free)
            ));
        }
        text
    }
}

fn thousandths(share: f64) -> f64 {
    (share * 1000.0).round() / 1000.0
}

/// `+1.2 MiB`, `-3 B`.
pub(super) fn signed(bytes: f64) -> String {
    let sign = if bytes < 0.0 { "-" } else { "+" };
    format!("{sign}{}", size(bytes.abs().round() as u64))
}

/// `15 s`, `5 min`, `4 h`.
fn duration_s(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        _ => format!("{} h", seconds / 3600),
    }
}
