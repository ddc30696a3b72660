//! Joins `image` and `cpython`: a mapped ELF file as the Python layer wants to see it.
//!
//! The one place that knows both.

use crate::addr::RemoteAddr;
use crate::cpython::{Binary, Span};
use crate::image::Module;

impl Binary for Module {
    fn path(&self) -> String {
        self.path().display().to_string()
    }

    fn symbol(&self, name: &str) -> Option<RemoteAddr> {
        self.symbol_addr(name)
    }

    fn section(&self, name: &str) -> Option<Span> {
        Module::section(self, name).map(|(start, len)| Span { start, len })
    }

    fn writable(&self) -> Vec<Span> {
        spans(self, |s| s.writable)
    }

    fn executable(&self) -> Vec<Span> {
        spans(self, |s| s.executable)
    }

    fn read_only(&self) -> Vec<Span> {
        spans(self, |s| !s.writable && !s.executable)
    }
}

fn spans(module: &Module, wanted: impl Fn(&crate::image::Segment) -> bool) -> Vec<Span> {
    module.segments().filter(|(_, _, s)| wanted(s)).map(|(start, len, _)| Span { start, len }).collect()
}

/// `modules` as [`crate::cpython::Python::locate`] takes them.
pub fn binaries(modules: &[Module]) -> Vec<&dyn Binary> {
    modules.iter().map(|m| m as &dyn Binary).collect()
}
