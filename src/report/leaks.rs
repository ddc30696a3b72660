//! `leaks`: a verdict per allocation site, with its evidence in one line.

use super::diff::label;
use super::facts::{Facts, write_run};
use super::figures::{Figures, is_false};
use super::text::{counted, duration, size};
use super::{ReportError, limited, write_json, write_rest};
use crate::analysis::{Leaks, Outline, ProcessGrowth, SiteVerdict, TooLittle, Verdict};
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

#[derive(Serialize)]
struct Document<'a> {
    report: &'static str,
    run: Facts<'a>,
    #[serde(skip_serializing_if = "is_false")]
    estimated: bool,
    moments: usize,
    old_seconds: u64,
    process: Process,
    sites: Vec<Site<'a>>,
}

#[derive(Serialize)]
struct Process {
    verdict: Option<&'static str>,
    evidence: String,
    resident_growth_bytes: Option<i64>,
    leaks_growth_bytes: i64,
    heap_free_bytes: Option<u64>,
    heap_in_use_bytes: Option<u64>,
}

#[derive(Serialize)]
struct Site<'a> {
    verdict: &'static str,
    function: Option<&'a str>,
    file: Option<&'a str>,
    line: Option<u32>,
    evidence: String,
    bytes: u64,
    count: u64,
    most_bytes: u64,
    growth_bytes: i64,
    bytes_per_hour: f64,
    bytes_per_hour_low_95: f64,
    bytes_per_hour_high_95: f64,
    old_share: Option<f64>,
    first_seen_ns: u64,
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
    /// Writes all of it, as text or as JSON.
    pub fn write(&self, json: bool, out: &mut dyn Write) -> Result<(), ReportError> {
        let sites = limited(&self.leaks.sites, self.max_rows);
        if json { self.json(sites, out) } else { self.text(sites, out) }
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

    fn json(&self, sites: &[SiteVerdict], out: &mut dyn Write) -> Result<(), ReportError> {
        let figures = self.figures();
        let ProcessGrowth { resident_growth, leaks_growth, heap_free, heap_in_use, fragmented } =
            self.leaks.process;
        let document = Document {
            report: "leaks",
            run: Facts::of(&self.outline.findings),
            estimated: figures.estimated,
            moments: self.leaks.moments,
            old_seconds: self.leaks.old_s,
            process: Process {
                verdict: fragmented.filter(|yes| *yes).map(|_| Verdict::Fragmentation.name()),
                evidence: self.process_text(),
                resident_growth_bytes: resident_growth,
                leaks_growth_bytes: leaks_growth as i64,
                heap_free_bytes: heap_free,
                heap_in_use_bytes: heap_in_use,
            },
            sites: sites.iter().map(|site| self.site(figures, site)).collect(),
        };
        write_json(&document, out)
    }

    fn site<'s>(&self, figures: Figures, site: &'s SiteVerdict) -> Site<'s> {
        Site {
            verdict: site.verdict.name(),
            function: site.name.function.as_deref(),
            file: site.name.file.as_deref(),
            line: site.name.line,
            evidence: self.evidence(site),
            bytes: site.live.bytes(),
            count: site.live.count(),
            most_bytes: site.most_bytes,
            growth_bytes: site.growth.0 as i64,
            bytes_per_hour: (site.rate.value * HOUR).round(),
            bytes_per_hour_low_95: (site.rate.low * HOUR).round(),
            bytes_per_hour_high_95: (site.rate.high * HOUR).round(),
            old_share: site.old_share.map(|share| (share * 1000.0).round() / 1000.0),
            first_seen_ns: site.first_seen_ns,
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
