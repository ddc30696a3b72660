//! `flamegraph`: the caller tree as an SVG, one box per frame, as wide as its bytes.
//!
//! What is handed to inferno is bounded whatever the capture holds: boxes narrower than a few thousandths
//! of a percent are merged, stacks end at a depth, and so does the text in all. What is merged is drawn as such,
//! so that widths add up.

use super::facts::{is_cut_or_damaged, total, view_text};
use super::figures::Figures;
use super::names::{NO_STACK, is_native, place};
use super::text::{counted, escaped, fitted, size};
use super::{Format, Report, ReportError};
use crate::analysis::{CallTree, Findings};
use crate::capture::StackId;
use inferno::flamegraph::color::{Color, PaletteMap};
use inferno::flamegraph::{self, Direction, Options, Palette};
use std::io::Write;

/// Smaller parts of the whole than one of so many are merged.
const FINEST: u64 = 20_000;
/// Frames of a stack that are drawn, from the outermost.
const MAX_DEPTH: usize = 400;
/// Characters of a frame's name.
const MAX_NAME: usize = 200;
/// Characters of the subtitle: 12 px Verdana or monospace in a picture 1200 px wide.
const SUBTITLE: usize = 150;
/// Bytes of text handed to inferno.
const MAX_TEXT: usize = 64 << 20;
/// inferno adds sizes up as floating-point numbers in places: exact to here.
const MAX_SUM: u128 = 1 << 53;

/// The report.
#[derive(Clone, Copy, Debug, Default)]
pub struct FlameGraph {
    /// Merge from the innermost frames: who asked for memory, then who called them.
    pub inverted: bool,
    /// Draw roots at the top.
    pub icicle: bool,
}

impl Report for FlameGraph {
    /// Writes the SVG; `format` does not matter to it.
    fn write(&self, findings: &Findings, _format: Format, out: &mut dyn Write) -> Result<(), ReportError> {
        let tree = CallTree::new(&findings.sites, &findings.stacks);
        let Folder { lines, mut native, .. } = fold(&tree, findings);
        if lines.is_empty() {
            return Err(ReportError::Nothing("the view shows no bytes"));
        }
        let mut options = Options::default();
        options.title = title(findings);
        options.subtitle = Some(subtitle(findings));
        options.count_name = "bytes".to_owned();
        options.name_type = "Frame:".to_owned();
        options.deterministic = true;
        options.colors = Palette::Basic(flamegraph::color::BasicPalette::Mem);
        if native.iter().next().is_some() {
            options.palette_map = Some(&mut native);
        }
        options.reverse_stack_order = self.inverted;
        options.direction = if self.icicle { Direction::Inverted } else { Direction::Straight };
        flamegraph::from_lines(&mut options, lines.iter().map(String::as_str), out)?;
        Ok(())
    }
}

fn title(findings: &Findings) -> String {
    let of = match &findings.merged {
        None => format!("pid {}", findings.header.pid),
        Some(merged) => counted(merged.processes.len() as u64, "capture"),
    };
    format!("heaptap: {of}, {}", Figures::of(findings).bytes(&total(findings)))
}

/// One line that fits the picture; what makes the figures doubtful comes first.
fn subtitle(findings: &Findings) -> String {
    let mut text = String::new();
    if is_cut_or_damaged(findings) {
        text.push_str("THE FILE IS CUT OR DAMAGED; ");
    }
    let dropped = findings.missing.dropped;
    if dropped > 0 {
        text.push_str(&format!("{dropped} EVENTS WERE DROPPED; "));
    }
    if let Some(mean) = findings.header.sampling_mean_bytes {
        text.push_str(&format!("estimates (± 95 %) from a sample at {} mean; ", size(mean)));
    }
    if findings.header.native {
        text.push_str("native frames are blue; ");
    }
    text.push_str(&format!(
        "{}; Python {}, {} breakpoints; ",
        view_text(findings),
        fitted(&escaped(&findings.header.python.version), 20),
        findings.header.breakpoints.name()
    ));
    let left = SUBTITLE.saturating_sub(text.chars().count()).max(20);
    text.push_str(&fitted(&escaped(&findings.header.command_line.join(" ")), left));
    text
}

/// A node to visit, and how much of the path was the caller's.
struct Visit {
    node: StackId,
    path_len: usize,
    depth: usize,
}

/// `outermost;…;innermost bytes` for every stack that has some, and the colours of native frames.
fn fold(tree: &CallTree, findings: &Findings) -> Folder {
    let root = tree.totals(StackId::EMPTY);
    // Sizes come from a file and may add up to anything: they are scaled to what can be added.
    let whole: u128 = findings.sites.iter().map(|row| u128::from(row.totals.bytes())).sum();
    let scale = whole.div_ceil(MAX_SUM).max(1) as u64;
    let smallest = (root.total.bytes() / FINEST).max(scale);
    let native = PaletteMap::default();
    let mut folder = Folder { lines: Vec::new(), text: 0, left_over: 0, scale, native };
    folder.line(NO_STACK, "", root.own.bytes());
    let mut path = String::new();
    let top = |node: &StackId| Visit { node: *node, path_len: 0, depth: 1 };
    let mut pending: Vec<Visit> = Vec::new();
    let drawn = folder.split(tree, StackId::EMPTY, "", smallest);
    pending.extend(drawn.iter().map(top));
    while let Some(Visit { node, path_len, depth }) = pending.pop() {
        path.truncate(path_len);
        if !path.is_empty() {
            path.push(';');
        }
        // `;` separates frames; a line is cut at its last blank, and a place ends in `)`.
        let name = place(tree.frame(node), &findings.stacks).replace(';', ":");
        let name = fitted(&name, MAX_NAME);
        if is_native(tree.frame(node), &findings.stacks) {
            folder.native.insert(&name, native_colour(&name));
        }
        path.push_str(&name);
        let totals = tree.totals(node);
        if depth >= MAX_DEPTH {
            folder.line(&path, ";(deeper frames)", totals.total.bytes());
            continue;
        }
        folder.line(&path, "", totals.own.bytes());
        let drawn = folder.split(tree, node, &path, smallest);
        pending.extend(drawn.iter().map(|node| Visit {
            node: *node,
            path_len: path.len(),
            depth: depth + 1,
        }));
    }
    let left_over = folder.left_over;
    folder.text = 0;
    folder.line("(too many stacks to draw)", "", left_over);
    folder
}

/// Blue, for Python's frames are green; which blue, the name says, so that a frame has one in every picture.
fn native_colour(name: &str) -> Color {
    let hash = crc32fast::hash(name.as_bytes());
    Color { r: 80 + (hash % 60) as u8, g: 130 + (hash >> 8) as u8 % 70, b: 205 + (hash >> 16) as u8 % 40 }
}

struct Folder {
    lines: Vec<String>,
    text: usize,
    left_over: u64,
    scale: u64,
    native: PaletteMap,
}

impl Folder {
    fn line(&mut self, path: &str, more: &str, bytes: u64) {
        if bytes / self.scale == 0 {
            return;
        }
        if self.text + path.len() > MAX_TEXT {
            self.left_over = self.left_over.saturating_add(bytes);
            return;
        }
        self.text += path.len() + more.len() + 20;
        self.lines.push(format!("{path}{more} {}", bytes / self.scale));
    }

    /// The children to draw; the others become one line.
    fn split<'t>(&mut self, tree: &'t CallTree, node: StackId, path: &str, smallest: u64) -> &'t [StackId] {
        let children = tree.children(node);
        // Biggest first, so those too small are a tail.
        let drawn = children.partition_point(|child| tree.totals(*child).total.bytes() >= smallest);
        let merged = children[drawn..]
            .iter()
            .fold(0u64, |sum, child| sum.saturating_add(tree.totals(*child).total.bytes()));
        self.line(path, if path.is_empty() { "(smaller)" } else { ";(smaller)" }, merged);
        &children[..drawn]
    }
}
