//! `heaptap doctor`: can this process be attached to, and how would it be done? Writes nothing into it.

use super::attach::Kind;
use super::parse::parse_pid;
use super::view::to_stdout;
use crate::error::Error;
use crate::inferior::memory::ProcessMemory;
use crate::inferior::{facts, maps};
use crate::probe::detour::Detour;
use crate::probe::error::ProbeError;
use crate::probe::hooks::wanted;
use crate::probe::install::check_entries;
use crate::probe::plan::EntryPoint;
use crate::recorder::RecordError;
use crate::recorder::examine::{Examined, Kind as ProbeKind, examine};
use crate::recorder::header::{command_line, executable};
use crate::recorder::plant::JumpOptions;
use crate::recorder::room;
use crate::report::ReportError;
use crate::report::text::{counted, escaped as printable, size};
use clap::Args;
use std::collections::BTreeMap;

/// Tell whether and how a process can be attached to, without touching it
#[derive(Debug, Args)]
#[command(after_help = "\
Reads /proc and the process's memory; stops nothing and writes nothing. Exit code 0 when the process can be \
attached to, 3 when not.

Examples:
  heaptap doctor --pid 1234
  heaptap doctor --pid 1234 --python-allocators")]
pub struct DoctorArgs {
    /// The process to look at
    #[arg(long, short, value_name = "PID", value_parser = parse_pid, allow_negative_numbers = true)]
    pub pid: i32,
    /// Plan for CPython's own allocators, too
    #[arg(long)]
    pub python_allocators: bool,
    /// The kind of breakpoint to plan for
    #[arg(long, value_name = "KIND", default_value = "jump")]
    pub breakpoints: Kind,
}

/// Runs the verb.
pub fn run(args: &DoctorArgs) -> Result<(), Error> {
    let pid = args.pid;
    let mut page = Page::default();
    let verdict = look(args, &mut page);
    match &verdict {
        Ok(()) => {
            let tables = if args.python_allocators { " --python-allocators" } else { "" };
            let kind = if args.breakpoints == Kind::Trap { " --breakpoints trap" } else { "" };
            page.0.push_str(&format!("can attach: heaptap attach --pid {pid}{tables}{kind}\n"));
        }
        Err(error) => {
            let hint = error.hint().map(|h| format!("; {h}")).unwrap_or_default();
            page.0.push_str(&format!("can't attach: {}{}\n", printable(&whole(error)), printable(&hint)));
        }
    }
    to_stdout(|out, _| Ok(out.write_all(page.0.as_bytes()).map_err(ReportError::from)?))?;
    verdict.map_err(|_| Error::CannotAttach { pid })
}

/// An error with what caused it, on one line.
fn whole(error: &Error) -> String {
    let causes = super::causes(error).into_iter().map(|cause| format!(": {cause}"));
    std::iter::once(error.to_string()).chain(causes).collect()
}

fn look(args: &DoctorArgs, page: &mut Page) -> Result<(), Error> {
    if let Err(error) = facts::check_attachable(args.pid) {
        if maps::status(args.pid, args.pid).is_ok() {
            about_process(page, args.pid);
        }
        return Err(Error::Record(error.into()));
    }
    about_process(page, args.pid);
    let examined =
        examine(args.pid, args.breakpoints.into(), args.python_allocators).map_err(Error::Record)?;
    about_python(page, &examined);
    about_allocators(page, &examined, args.breakpoints.into());
    about_memory(page, &examined, args.breakpoints.into())?;
    about_self_test(page, &examined)?;
    Ok(check(&examined, args.breakpoints.into())?)
}

/// What is printed, at once and at the end: a reader that has gone then changes nothing.
#[derive(Default)]
struct Page(String);

impl Page {
    fn line(&mut self, name: &str, value: impl std::fmt::Display) {
        let line = format!("{name:<18} {value}");
        self.0.push_str(line.trim_end());
        self.0.push('\n');
    }
}

fn about_process(page: &mut Page, pid: i32) {
    page.line("process", format!("{pid} {}", printable(&command_line(pid).join(" "))));
    let executable = executable(pid);
    page.line("executable", if executable.is_empty() { "unknown".into() } else { printable(&executable) });
    if let Ok(status) = maps::status(pid, pid) {
        page.line("user", format!("{} (heaptap runs as {})", status.euid, nix::unistd::geteuid()));
        page.line("rights", rights());
        page.line(
            "traced by",
            if status.tracer_pid == 0 { "nobody".into() } else { status.tracer_pid.to_string() },
        );
        page.line(
            "seccomp",
            match status.seccomp {
                Some(0) => "none",
                Some(1) => "strict",
                Some(_) => "filter (suspended for each injected system call; needs CAP_SYS_ADMIN)",
                None => "unknown",
            },
        );
        page.line("threads", maps::tasks(pid).map_or(0, |t| t.len()));
    }
    page.line("namespaces", namespaces(pid));
}

fn rights() -> String {
    let caps = maps::effective_capabilities().unwrap_or(0);
    let has = |bit: u32| if caps & (1 << bit) != 0 { "yes" } else { "no" };
    let scope = facts::ptrace_scope().map_or_else(|| "not there".into(), |s| s.to_string());
    // capability.h: CAP_SYS_PTRACE is 19, CAP_SYS_ADMIN 21.
    format!("CAP_SYS_PTRACE {}, CAP_SYS_ADMIN {}, kernel.yama.ptrace_scope {scope}", has(19), has(21))
}

fn namespaces(pid: i32) -> String {
    let (mut differing, mut unknown) = (Vec::new(), Vec::new());
    for ns in ["pid", "mnt", "user", "net"] {
        let link = |who: &str| std::fs::read_link(format!("/proc/{who}/ns/{ns}"));
        match (link("self"), link(&pid.to_string())) {
            (Ok(own), Ok(other)) if own == other => {}
            (Ok(_), Ok(_)) => differing.push(ns),
            _ => unknown.push(ns),
        }
    }
    match (differing.is_empty(), unknown.is_empty()) {
        (true, true) => "heaptap's own".into(),
        (false, true) => format!("other: {}", differing.join(", ")),
        (_, false) => "unknown (not permitted to look)".into(),
    }
}

fn about_python(page: &mut Page, examined: &Examined) {
    let python = &examined.python;
    page.line("python", format!("CPython {}, {}", python.version, python.flavour));
    for evidence in &python.evidence {
        page.line(
            "",
            format!("{}: {} ({})", evidence.fact, printable(&evidence.value), printable(&evidence.source)),
        );
    }
    page.line("layout", &python.layout_source);
}

fn about_allocators(page: &mut Page, examined: &Examined, kind: ProbeKind) {
    page.line("libc", examined.libc_name());
    page.line("malloc is in", printable(&examined.allocator_library()));
    if !examined.stale.is_empty() {
        page.line(
            "left by heaptap",
            format!("{} of one that was killed", counted(examined.stale.len() as u64, "region")),
        );
    }
    let mut by_module: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for entry in &examined.plan.entries {
        let names = entry.names.join("=");
        let place = if kind == ProbeKind::Jump { jump_place(entry) } else { String::new() };
        by_module.entry(&entry.module).or_default().push(format!("{names} {}{place}", entry.address));
    }
    let title = if kind == ProbeKind::Jump { "jumps" } else { "trap breakpoints" };
    for (module, entries) in by_module {
        page.line(title, printable(module));
        for entry in entries {
            page.line("", entry);
        }
    }
    for word in &examined.plan.words {
        page.line("allocator table", format!("{} {} -> {}", word.function().name(), word.word, word.value));
    }
}

/// What recording adds (samples, where jumps are planned), and what there is room for.
fn about_memory(page: &mut Page, examined: &Examined, kind: ProbeKind) -> Result<(), RecordError> {
    let jump = (kind == ProbeKind::Jump).then(JumpOptions::samples);
    let added = size(room::needed(examined, jump.as_ref(), 0)?);
    let left = match room::tightest(examined.pid) {
        Some(room) => {
            format!("{} left of {} in {}", size(room.left()), size(room.limit), room.group.display())
        }
        None => "no limit on the process".into(),
    };
    page.line("memory", format!("recording adds up to {added}; {}", printable(&left)));
    Ok(())
}

/// Where in a function its jump goes, or why none does.
fn jump_place(entry: &EntryPoint) -> String {
    match Detour::plan(entry) {
        Ok(Detour { kept_len: 0, .. }) => ", at its entry".into(),
        Ok(Detour { kept_len, .. }) => format!(", {kept_len} bytes behind its entry"),
        Err(error) => format!(", none: {error}"),
    }
}

/// The process runs while it is looked at: a thread that moves is looked at again.
fn about_self_test(page: &mut Page, examined: &Examined) -> Result<(), RecordError> {
    let memory = ProcessMemory::new(examined.pid);
    let tids: Vec<i32> = maps::namespaced_tasks(examined.pid)?.into_iter().map(|(_, inner)| inner).collect();
    let mut result = examined.python.self_test(&memory, &tids);
    for _ in 0..50 {
        if result.is_ok() {
            break;
        }
        result = examined.python.self_test(&memory, &tids);
    }
    let passed = result?;
    let sample = passed.sample.as_ref().map_or_else(String::new, |s| {
        format!(", one in {} ({})", printable(&s.function), printable(&s.file))
    });
    let (threads, frames) =
        (counted(passed.threads as u64, "thread"), counted(passed.frames as u64, "frame"));
    page.line("layout self-test", format!("passed: {threads}, {frames}{sample}"));
    Ok(())
}

/// What `attach` would refuse.
fn check(examined: &Examined, kind: ProbeKind) -> Result<(), RecordError> {
    examined.check_recordable(kind, false)?;
    room::check(examined, (kind == ProbeKind::Jump).then(JumpOptions::samples).as_ref(), 0)?;
    if let Some(alive) = examined.stale.iter().find(|s| s.controller_lives()) {
        return Err(ProbeError::ControllerAlive { pid: examined.pid, controller: alive.controller.0 }.into());
    }
    if kind == ProbeKind::Jump {
        wanted(&examined.plan, examined.code_dealloc)?;
    }
    if examined.stale.is_empty() {
        check_entries(&ProcessMemory::new(examined.pid), &examined.plan)?;
    }
    Ok(())
}
