//! `heaptap doctor`: can this process be attached to, and how would it be done? Writes nothing into it.

use crate::error::Error;
use crate::inferior::memory::ProcessMemory;
use crate::inferior::{facts, maps};
use crate::probe::error::ProbeError;
use crate::probe::install::check_entries;
use crate::recorder::RecordError;
use crate::recorder::examine::{Examined, examine};
use crate::recorder::header::{command_line, executable};
use crate::report::text::escaped as printable;
use clap::Args;
use std::collections::BTreeMap;

/// Tell whether and how a process can be attached to, without touching it
#[derive(Debug, Args)]
#[command(after_help = "\
Reads /proc and the process's memory; stops nothing and writes nothing. Exit code 0 when the process can be
attached to, 3 when not.

Examples:
  heaptap doctor --pid 1234
  heaptap doctor --pid 1234 --python-allocators")]
pub struct DoctorArgs {
    /// The process to look at
    #[arg(long, short, value_name = "PID")]
    pub pid: i32,
    /// Plan for CPython's own allocators, too
    #[arg(long)]
    pub python_allocators: bool,
}

/// Runs the verb.
pub fn run(args: &DoctorArgs) -> Result<(), Error> {
    let pid = args.pid;
    about_process(pid);
    let verdict = examine(pid, args.python_allocators).and_then(|examined| {
        about_python(&examined);
        about_allocators(&examined);
        about_self_test(&examined)?;
        check(&examined)
    });
    match verdict {
        Ok(()) => {
            println!("can attach: heaptap attach --pid {pid}");
            Ok(())
        }
        Err(error) => {
            let error = Error::Record(error);
            let hint = error.hint().map(|h| format!("; {h}")).unwrap_or_default();
            println!("can't attach: {error}{hint}");
            Err(Error::CannotAttach { pid })
        }
    }
}

fn line(name: &str, value: impl std::fmt::Display) {
    println!("{name:<18} {value}");
}

fn about_process(pid: i32) {
    line("process", format!("{pid} {}", printable(&command_line(pid).join(" "))));
    line("executable", printable(&executable(pid)));
    if let Ok(status) = maps::status(pid, pid) {
        line("user", format!("{} (heaptap runs as {})", status.euid, nix::unistd::geteuid()));
        line("rights", rights());
        line(
            "traced by",
            if status.tracer_pid == 0 { "nobody".into() } else { status.tracer_pid.to_string() },
        );
        line(
            "seccomp",
            match status.seccomp {
                Some(0) => "none",
                Some(1) => "strict",
                Some(_) => "filter (suspended for each injected system call; needs CAP_SYS_ADMIN)",
                None => "unknown",
            },
        );
        line("threads", maps::tasks(pid).map_or(0, |t| t.len()));
    }
    line("namespaces", namespaces(pid));
}

fn rights() -> String {
    let caps = maps::effective_capabilities().unwrap_or(0);
    let has = |bit: u32| if caps & (1 << bit) != 0 { "yes" } else { "no" };
    let scope = facts::ptrace_scope().map_or_else(|| "not there".into(), |s| s.to_string());
    // capability.h: CAP_SYS_PTRACE is 19, CAP_SYS_ADMIN 21.
    format!("CAP_SYS_PTRACE {}, CAP_SYS_ADMIN {}, kernel.yama.ptrace_scope {scope}", has(19), has(21))
}

fn namespaces(pid: i32) -> String {
    let differing: Vec<&str> = ["pid", "mnt", "user", "net"]
        .into_iter()
        .filter(|ns| {
            let link = |who: &str| std::fs::read_link(format!("/proc/{who}/ns/{ns}")).ok();
            link("self") != link(&pid.to_string())
        })
        .collect();
    if differing.is_empty() { "heaptap's own".into() } else { format!("other: {}", differing.join(", ")) }
}

fn about_python(examined: &Examined) {
    let python = &examined.python;
    line("python", format!("CPython {}, {}", python.version, python.flavour));
    for evidence in &python.evidence {
        line(
            "",
            format!("{}: {} ({})", evidence.fact, printable(&evidence.value), printable(&evidence.source)),
        );
    }
    line("layout", &python.layout_source);
}

fn about_allocators(examined: &Examined) {
    line("libc", examined.libc_name());
    line("malloc is in", printable(&examined.allocator_library()));
    if !examined.stale.is_empty() {
        line("left by heaptap", format!("{} region(s) of one that was killed", examined.stale.len()));
    }
    let mut by_module: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for entry in &examined.plan.entries {
        let names = entry.names.join("=");
        by_module.entry(&entry.module).or_default().push(format!("{names} {}", entry.address));
    }
    for (module, entries) in by_module {
        line("trap breakpoints", printable(module));
        for entry in entries {
            line("", entry);
        }
    }
    for word in &examined.plan.words {
        line("allocator table", format!("{} {} -> {}", word.function().name(), word.word, word.value));
    }
}

/// The process runs while it is looked at: a thread that moves is looked at again.
fn about_self_test(examined: &Examined) -> Result<(), RecordError> {
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
    line("layout self-test", format!("passed: {} threads, {} frames{sample}", passed.threads, passed.frames));
    Ok(())
}

/// What `attach` would refuse.
fn check(examined: &Examined) -> Result<(), RecordError> {
    examined.check_recordable(false)?;
    if let Some(alive) = examined.stale.iter().find(|s| s.controller_lives()) {
        return Err(ProbeError::ControllerAlive { pid: examined.pid, controller: alive.controller.0 }.into());
    }
    if examined.stale.is_empty() {
        check_entries(&ProcessMemory::new(examined.pid), &examined.plan)?;
    }
    Ok(())
}
