//! [`Family`]: the captures of a folder as one, at moments of the wall clock.
//!
//! Each process has snapshots at times of its own: of each the nearest to the moment is taken. One whose recording had not begun has nothing
//! by its account; one that had ended has nothing any more. What several captures hold is united by the names of code.

use super::diff::{Diff, DiffOptions, Sums};
use super::merge::Merge;
use super::moments::{Moment, Outline, When};
use super::replay::View;
use crate::capture::{CaptureError, EndReason, ReadOptions, StackTable};
use std::path::{Path, PathBuf};

/// Processes that are ended together end one after the other: who ended so little before a moment still counts.
const TOGETHER_NS: u64 = 5_000_000_000;

/// See the module.
pub struct Family {
    members: Vec<Outline>,
    /// What is known of all together; it has no snapshots.
    whole: Outline,
}

impl Family {
    /// Reads captures once; `left_out` is told of those that can't be read. `None` if there are no others. `not_recorded`: so many processes
    /// of the same recording have no capture.
    pub fn read(
        (path, options): (&Path, &ReadOptions),
        captures: impl Iterator<Item = PathBuf>,
        not_recorded: u64,
        mut left_out: impl FnMut(CaptureError),
    ) -> Result<Option<Self>, CaptureError> {
        let (mut merge, mut members, mut not_recorded) =
            (Merge::new(View::Leaks, false), Vec::new(), not_recorded);
        for capture in captures {
            match Outline::read(&capture, options) {
                Ok(mut outline) => {
                    merge.add(&capture, &outline.findings)?;
                    // Of many processes at once nothing is held that is read again.
                    outline.findings.stacks = StackTable::default();
                    (outline.findings.sites, outline.gauges) = (Vec::new(), Vec::new());
                    members.push(outline);
                }
                Err(error) => {
                    left_out(error);
                    not_recorded += 1;
                }
            }
        }
        let Some(findings) = merge.finish(not_recorded) else { return Ok(None) };
        let start = findings.header.start_unix_ns;
        let end_ns = members.iter().map(|member| since(member.end_unix_ns(), start)).max().unwrap_or(0);
        let (snapshots, gauges) = (Vec::new(), Vec::new());
        let (path, options) = (path.to_owned(), options.clone());
        let whole = Outline { path, options, findings, snapshots, gauges, end_ns };
        Ok(Some(Self { members, whole }))
    }

    /// What is known of all together. Its moments are since the start of the first.
    pub fn whole(&self) -> &Outline {
        &self.whole
    }

    /// What grew from a moment of `old`, or of this where it is `None`, to a moment of this.
    pub fn diff(
        &self,
        old: Option<&Self>,
        from: Moment,
        to: Moment,
        options: &DiffOptions,
    ) -> Result<Diff, CaptureError> {
        let mut sums = Sums::new(options, old.is_none());
        if let Some(old) = old {
            sums.compare(&old.whole.findings.stacks, &self.whole.findings.stacks);
            for member in &old.members {
                sums.add_old(member, old.moment_of(member, from))?;
            }
        }
        for member in &self.members {
            let from = if old.is_none() { self.moment_of(member, from) } else { None };
            let to = self.moment_of(member, to);
            // Gone before the first moment, or born after the second.
            if from.or(to).is_some() && (from, to) != (Some(Moment::START), None) {
                sums.add(member, from, to)?;
            }
        }
        Ok(sums.finish())
    }

    /// The moment of one of them; `None` if its process had ended.
    fn moment_of(&self, member: &Outline, moment: Moment) -> Option<Moment> {
        if moment == Moment::START {
            return Some(moment);
        }
        let unix_ns = self.whole.findings.header.start_unix_ns.saturating_add(moment.time_ns);
        if unix_ns < member.findings.header.start_unix_ns {
            return Some(Moment::START);
        }
        let at = since(unix_ns, member.findings.header.start_unix_ns);
        if has_ended(member) && at > member.end_ns.saturating_add(TOGETHER_NS) {
            return None;
        }
        // A time after the start is one that every recording has.
        member.find(When::AfterStart(at.min(member.end_ns))).ok()
    }
}

fn since(unix_ns: u64, start_unix_ns: u64) -> u64 {
    unix_ns.saturating_sub(start_unix_ns)
}

fn has_ended(member: &Outline) -> bool {
    member.findings.trailer.as_ref().is_some_and(|trailer| {
        matches!(
            trailer.reason,
            EndReason::TargetExited { .. }
                | EndReason::TargetKilled { .. }
                | EndReason::TargetGone
                | EndReason::TargetExec { .. }
        )
    })
}
