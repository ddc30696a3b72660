//! Sums over many runs, held against the truth.

use super::{Mode, Run, Truth};
use heaptap::analysis::Totals;
use std::collections::BTreeMap;

/// One figure of all runs: an estimate of bytes or blocks.
#[derive(Default)]
struct Figure {
    truth: f64,
    /// Of one estimate, by theory, for the smallest interval there was and the largest.
    variances: (f64, f64),
    estimates: Vec<(f64, f64)>,
}

/// All figures.
pub struct Figures {
    mode: Mode,
    figures: BTreeMap<String, Figure>,
    runs: u64,
    spoiled: u64,
}

impl Figures {
    pub fn new(mode: Mode) -> Figures {
        Figures { mode, figures: BTreeMap::new(), runs: 0, spoiled: 0 }
    }

    /// Runs that were added and had no drops, and all.
    pub fn runs(&self) -> (u64, u64) {
        (self.runs, self.runs + self.spoiled)
    }

    /// Adds a run: each place's and all places' bytes and blocks, of all allocations and of the live ones.
    pub fn add(&mut self, truth: &Truth, run: &Run) {
        // A sample does not wait for long for a thread that was interrupted while it wrote one: on a busy machine some are dropped. Such a
        // capture says so; its estimates are too low by what was dropped.
        if run.drops > 0 {
            self.spoiled += 1;
            return;
        }
        self.runs += 1;
        let (mut all, mut all_live) = (Vec::new(), Vec::new());
        let (mut sum, mut sum_live) = (Totals::default(), Totals::default());
        for (name, place) in &truth.places {
            let live: Vec<u64> = place.live.values().copied().collect();
            // A place without samples has no row: an estimate of nothing.
            let allocated = run.allocated.get(name).copied().unwrap_or_default();
            let leaks = run.leaks.get(name).copied().unwrap_or_default();
            self.add_totals(&format!("allocated by {name}"), &place.sizes, allocated);
            self.add_totals(&format!("live of {name}"), &live, leaks);
            all.extend_from_slice(&place.sizes);
            all_live.extend(live);
            sum.add(allocated);
            sum_live.add(leaks);
        }
        self.add_totals("allocated", &all, sum);
        self.add_totals("live", &all_live, sum_live);
    }

    fn add_totals(&mut self, name: &str, sizes: &[u64], totals: Totals) {
        let (least, largest) = match self.mode {
            Mode::Fixed(interval) => (interval, interval),
            Mode::Between(least, largest) => (least, largest),
        };
        // Of 1/p for each that is sampled with p: (1 - p) / p.
        let each = |size: f64, interval: u64| 1.0 / (size / interval as f64).exp_m1();
        let sizes = || sizes.iter().map(|size| *size as f64);
        let of_bytes = |interval| sizes().map(|s| s * s * each(s, interval)).sum::<f64>();
        let of_blocks = |interval| sizes().map(|s| each(s, interval)).sum::<f64>();
        let bytes = (sizes().sum(), (of_bytes(least), of_bytes(largest)));
        let blocks = (sizes().count() as f64, (of_blocks(least), of_blocks(largest)));
        let estimates = [
            (format!("bytes {name}"), bytes, (totals.bytes() as f64, totals.bytes_error())),
            (format!("blocks {name}"), blocks, (totals.count() as f64, totals.count_error())),
        ];
        for (name, (truth, variances), estimate) in estimates {
            let figure = self.figures.entry(name.clone()).or_default();
            assert!(figure.estimates.is_empty() || figure.truth == truth, "{name}: the truth changes");
            (figure.truth, figure.variances) = (truth, variances);
            figure.estimates.push(estimate);
        }
    }

    /// Checks bias, spread and coverage of all figures. So many figures are looked at that of those three standard errors from
    /// the truth one or two may be seen by chance; five are none.
    pub fn check(&self) {
        println!("{} runs, {} others with drops", self.runs, self.spoiled);
        assert!(self.spoiled <= self.runs, "{} runs with drops, {} without", self.spoiled, self.runs);
        let (mut far, mut wrong) = (Vec::new(), Vec::new());
        for (name, figure) in &self.figures {
            let line = figure.line(name);
            println!("{line}");
            if figure.bias().abs() > 5.0 || figure.is_covered_too_seldom(name) {
                wrong.push(line.clone());
            } else if !figure.is_spread_as_theory_says(name) {
                wrong.push(format!("{line}: not the spread that theory says"));
            }
            if figure.bias().abs() > 3.0 {
                far.push(line);
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
        assert!(far.len() <= 2, "{} of {} figures:\n{}", far.len(), self.figures.len(), far.join("\n"));
    }
}

impl Figure {
    fn runs(&self) -> f64 {
        self.estimates.len() as f64
    }

    fn mean(&self) -> f64 {
        self.estimates.iter().map(|(value, _)| value).sum::<f64>() / self.runs()
    }

    fn deviation(&self) -> f64 {
        let mean = self.mean();
        let squares = self.estimates.iter().map(|(value, _)| (value - mean).powi(2)).sum::<f64>();
        (squares / (self.runs() - 1.0)).sqrt()
    }

    /// The mean's distance from the truth, in standard errors.
    fn bias(&self) -> f64 {
        // Figures are rounded to whole ones.
        (self.mean() - self.truth) / (self.spread().max(0.5) / self.runs().sqrt())
    }

    /// Deviation of one estimate by theory; as it was seen, but within what theory allows, where theory knows only bounds. (Small blocks
    /// are sampled so seldom that what was seen shows nothing when none was.)
    fn spread(&self) -> f64 {
        let (least, largest) = self.variances;
        self.deviation().clamp(least.sqrt(), largest.sqrt())
    }

    fn covered(&self) -> f64 {
        let covers = |(value, error): &&(f64, f64)| (value - self.truth).abs() <= error + 0.5;
        self.estimates.iter().filter(covers).count() as f64
    }

    /// Fewer than four standard deviations of a binomial distribution below its mean. The blocks of a place whose sizes go
    /// from 16 bytes to 4 MiB are nearly all small, and of these often none is sampled: docs/reports.md says so, with the level as measured here.
    fn is_covered_too_seldom(&self, name: &str) -> bool {
        let level = if name.starts_with("blocks") && name.ends_with("mixed") { 0.6 } else { 0.95 };
        let runs = self.runs();
        self.covered() < level * runs - 4.0 * (runs * level * (1.0 - level)).sqrt()
    }

    /// Whether the variance seen can be the one of theory: within five standard errors of a variance's estimate, and half as
    /// many again for the tails of few samples.
    fn is_spread_as_theory_says(&self, name: &str) -> bool {
        let (least, largest) = self.variances;
        if largest < 1.0 || name.ends_with("mixed") {
            return true;
        }
        let (seen, tolerance) = (self.deviation().powi(2), 7.5 * (2.0 / (self.runs() - 1.0)).sqrt());
        seen > least * (1.0 - tolerance) && seen < largest * (1.0 + tolerance)
    }

    fn line(&self, name: &str) -> String {
        format!(
            "{name}: {} is the truth, {:.0} the mean of {} runs: {:.2} standard errors off; {} cover it; deviation {:.0}, by theory {:.0}",
            self.truth,
            self.mean(),
            self.runs(),
            self.bias(),
            self.covered(),
            self.deviation(),
            self.variances.1.sqrt()
        )
    }
}
