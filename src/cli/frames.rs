//! Which frames are shown, for all verbs that show stacks with C frames.

use crate::capture::{FrameView, NativePlace, ReadOptions, Symbolizer};
use crate::native;
use std::rc::Rc;

/// Which frames of stacks with C frames to show.
#[derive(clap::Args, Clone, Copy, Debug)]
pub struct FrameArgs {
    /// Leave out C frames of Python itself; =false shows them.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value_t = true,
          default_missing_value = "true", action = clap::ArgAction::Set, hide_possible_values = true)]
    pub hide_interpreter: bool,

    /// Show native frames only (C, C++, Rust), or Python's only.
    #[arg(long, value_enum, value_name = "KIND")]
    pub only: Option<Only>,
}

/// What runs a frame's code.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Only {
    /// C, C++, Rust or whatever else was compiled
    Native,
    /// Python
    Python,
}

impl FrameArgs {
    /// What is shown.
    pub(super) fn view(self) -> FrameView {
        FrameView {
            python: self.only != Some(Only::Native),
            native: self.only != Some(Only::Python),
            interpreter: !self.hide_interpreter,
        }
    }

    /// How captures are read so that this is shown of them.
    pub(super) fn read_options(self) -> ReadOptions {
        let names = Names(native::Symbolizer::from_environment());
        ReadOptions { view: self.view(), symbolizer: Some(Rc::new(names)) }
    }
}

/// Names that a capture does not have, looked up on this machine and on the servers that its user has named.
struct Names(native::Symbolizer);

impl Symbolizer for Names {
    fn places(&self, path: &str, build_id: &[u8], address: u64) -> Vec<NativePlace> {
        let place = |native::Place { function, file, line }| NativePlace { function, file, line };
        self.0.places(path, build_id, address).into_iter().map(place).collect()
    }
}
