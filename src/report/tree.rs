//! `tree`: who called whom, for the stacks that have most.
//!
//! Callers above callees. A run of frames that only call the next is drawn at one indentation, and its
//! middle left out where it is long. JSON is a flat list of nodes with parents: a nested one would be as
//! deep as the deepest recursion.

use super::facts::{Facts, Shown, total, write_view};
use super::figures::{Figures, NestedErrors};
use super::names::{Location, location, place};
use super::text::{counted, fitted, percent, share};
use super::{Format, Report, ReportError, write_json};
use crate::analysis::{CallTree, Findings, SiteTotals, Totals};
use crate::capture::StackId;
use serde::Serialize;
use std::collections::HashMap;
use std::io::Write;

/// Of a longer run, the first and the last frames of it that are shown.
const RUN_ENDS: usize = 2;
/// Characters of the figures.
const BYTES: usize = 10;
const SHARE: usize = 6;
const COUNT: usize = 7;
/// Indentation beyond which callees are counted and not drawn: nobody reads that far to the right, and
/// a tree that branches at every level would take the square of its depth.
const MAX_INDENT: usize = 240;

/// The report.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tree {
    /// How many stacks, the biggest; 0 for all.
    pub max_stacks: usize,
    /// Leave no frames of long runs out.
    pub all_frames: bool,
}

#[derive(Serialize)]
struct Document<'a> {
    report: &'static str,
    run: Facts<'a>,
    #[serde(flatten)]
    shown: Shown,
    /// Parents before children; node 0 is the root.
    nodes: Vec<Node<'a>>,
}

#[derive(Serialize)]
struct Node<'a> {
    id: usize,
    parent: Option<usize>,
    #[serde(flatten)]
    location: Location<'a>,
    total_bytes: u64,
    total_percent: f64,
    total_count: u64,
    own_bytes: u64,
    own_count: u64,
    #[serde(flatten)]
    errors: Option<NestedErrors>,
}

impl Report for Tree {
    fn write(&self, findings: &Findings, format: Format, out: &mut dyn Write) -> Result<(), ReportError> {
        let (sites, left_out) = self.biggest(findings);
        let tree = CallTree::new(&sites, &findings.stacks);
        if format.json {
            Self::json(findings, &tree, out)
        } else {
            self.text(findings, &tree, left_out, format, out)
        }
    }
}

impl Tree {
    /// The sites of the stacks that have most, and how much all others have.
    fn biggest(&self, findings: &Findings) -> (Vec<SiteTotals>, (usize, Totals)) {
        let mut sums: HashMap<StackId, Totals> = HashMap::new();
        for row in &findings.sites {
            sums.entry(row.site.stack).or_default().add(row.totals);
        }
        let mut stacks: Vec<(StackId, Totals)> = sums.into_iter().collect();
        stacks.sort_by(|a, b| b.1.compare(&a.1).then(a.0.cmp(&b.0)));
        let kept = if self.max_stacks == 0 { stacks.len() } else { self.max_stacks.min(stacks.len()) };
        let mut others = Totals::default();
        for (_, totals) in &stacks[kept..] {
            others.add(*totals);
        }
        let left_out = (stacks.len() - kept, others);
        let kept: std::collections::HashSet<StackId> =
            stacks[..kept].iter().map(|(stack, _)| *stack).collect();
        (findings.sites.iter().filter(|row| kept.contains(&row.site.stack)).copied().collect(), left_out)
    }

    fn text(
        &self,
        findings: &Findings,
        tree: &CallTree,
        (stacks, others): (usize, Totals),
        format: Format,
        out: &mut dyn Write,
    ) -> Result<(), ReportError> {
        write_view(findings, out)?;
        let figures = Figures::of(findings);
        let whole = total(findings).bytes();
        let mut lines = Lines { findings, tree, figures, whole, width: format.width, out };
        let shown = tree.totals(StackId::EMPTY).total;
        let root = if stacks == 0 {
            "<all>".into()
        } else if self.max_stacks == 1 {
            "<the biggest stack>".into()
        } else {
            format!("<the {} biggest stacks>", self.max_stacks)
        };
        lines.line(shown, "", &root)?;
        let own = tree.totals(StackId::EMPTY).own;
        if !own.is_empty() {
            let last = tree.children(StackId::EMPTY).is_empty();
            lines.line(own, if last { "└── " } else { "├── " }, super::names::NO_STACK)?;
        }
        // What is still to draw: a node, the indentation of its line, whether it is the last child.
        let mut pending = vec![];
        push_children(&mut pending, tree, StackId::EMPTY, "");
        while let Some((node, indent, last)) = pending.pop() {
            let below = format!("{indent}{}", if last { "    " } else { "│   " });
            let end = self.run(
                &mut lines,
                node,
                &format!("{indent}{}", if last { "└── " } else { "├── " }),
                &below,
            )?;
            if below.chars().count() > MAX_INDENT && !tree.children(end).is_empty() {
                let callees = counted(tree.children(end).len() as u64, "callee");
                lines.without_figures(&below, &format!("{callees} and what is below"))?;
                continue;
            }
            push_children(&mut pending, tree, end, &below);
        }
        if stacks > 0 {
            let what = counted(stacks as u64, "smaller stack");
            let bytes = figures.bytes(&others);
            writeln!(lines.out, "… and {what} with {bytes} (--max-stacks 0 shows all)")?;
        }
        Ok(())
    }

    /// Draws a node and those below it up to where it branches or something is allocated; gives the last.
    fn run(
        &self,
        lines: &mut Lines<'_>,
        node: StackId,
        first: &str,
        below: &str,
    ) -> Result<StackId, ReportError> {
        let mut run = vec![node];
        let mut end = node;
        while let ([only], true) = (lines.tree.children(end), lines.tree.totals(end).own.is_empty()) {
            end = *only;
            run.push(end);
        }
        let hidden = if self.all_frames { 0 } else { run.len().saturating_sub(2 * RUN_ENDS + 1) };
        let hidden = if hidden == 0 { 0 } else { run.len() - 2 * RUN_ENDS };
        for (at, node) in run.iter().enumerate() {
            if at >= RUN_ENDS && at < RUN_ENDS + hidden {
                if at == RUN_ENDS {
                    lines.without_figures(below, &counted(hidden as u64, "frame"))?;
                }
                continue;
            }
            let name = place(lines.tree.frame(*node), &lines.findings.stacks);
            lines.line(lines.tree.totals(*node).total, if at == 0 { first } else { below }, &name)?;
        }
        Ok(end)
    }

    fn json(findings: &Findings, tree: &CallTree, out: &mut dyn Write) -> Result<(), ReportError> {
        let (figures, whole) = (Figures::of(findings), total(findings).bytes());
        let mut nodes: Vec<Node<'_>> = Vec::new();
        let mut pending = vec![(StackId::EMPTY, None)];
        while let Some((node, parent)) = pending.pop() {
            let id = nodes.len();
            let totals = tree.totals(node);
            nodes.push(Node {
                id,
                parent,
                location: location(tree.frame(node), &findings.stacks),
                total_bytes: totals.total.bytes(),
                total_percent: percent(totals.total.bytes(), whole),
                total_count: totals.total.count(),
                own_bytes: totals.own.bytes(),
                own_count: totals.own.count(),
                errors: figures.nested_errors(&totals.total, &totals.own),
            });
            pending.extend(tree.children(node).iter().rev().map(|child| (*child, Some(id))));
        }
        let document =
            Document { report: "tree", run: Facts::of(findings), shown: Shown::of(findings), nodes };
        write_json(&document, out)
    }
}

/// Writes lines of figures and a place in the tree.
struct Lines<'a> {
    findings: &'a Findings,
    tree: &'a CallTree,
    figures: Figures,
    whole: u64,
    width: Option<usize>,
    out: &'a mut dyn Write,
}

impl Lines<'_> {
    fn line(&mut self, totals: Totals, indent: &str, name: &str) -> Result<(), ReportError> {
        let used = self.blank() + indent.chars().count();
        let width = self.width.map_or(usize::MAX, |width| width.saturating_sub(used).max(20));
        let share = share(totals.bytes(), self.whole);
        let bytes = self.figures.right(&self.figures.bytes(&totals), BYTES);
        let count = self.figures.right(&self.figures.count(&totals), COUNT);
        writeln!(self.out, "{bytes} {share:>SHARE$} {count} {indent}{}", fitted(name, width))?;
        Ok(())
    }

    /// A line that stands for others.
    fn without_figures(&mut self, indent: &str, what: &str) -> Result<(), ReportError> {
        let blank = self.blank();
        writeln!(self.out, "{:blank$}{indent}⋮ {what}", "")?;
        Ok(())
    }

    /// Characters before the indentation.
    fn blank(&self) -> usize {
        self.figures.width(BYTES) + self.figures.width(COUNT) + SHARE + 3
    }
}

/// Puts the children of `node` so that the biggest is drawn first.
fn push_children(pending: &mut Vec<(StackId, String, bool)>, tree: &CallTree, node: StackId, indent: &str) {
    let children = tree.children(node).iter().rev().enumerate();
    pending.extend(children.map(|(at, child)| (*child, indent.to_owned(), at == 0)));
}
