//! What lies near the hooked functions in the target, for the jump kind: per hook a thunk that leads to the agent, the
//! [`Descriptor`] that it passes, and the trampoline that runs the function as if it were not hooked. Bytes only: mapping and
//! writing them is [`super::load`]'s.
//!
//! ```text
//! region (16 KiB, readable and executable, never writable)
//! ┌──────────────────────┬────────────────────┬──────────────────────────────────────────┐
//! │ header, see constants│ patches × 64       │ thunk, descriptor, trampoline; thunk, …   │
//! └──────────────────────┴────────────────────┴──────────────────────────────────────────┘
//! ```
//! The first region of a process names all there is of ours in it: [`super::stale`] finds it by its magic and takes it back.
//! The agent's image lies right behind it.

use super::detour::{Detour, Trampoline, Undo};
use super::error::ProbeError;
use super::region::{Controller, HEADER_LEN, INT3, PATCH_LEN, Patch, REGION_LEN};
use crate::addr::RemoteAddr;
use crate::agent_abi::{ABI_VERSION, Descriptor};

/// First bytes of a region of the jump kind.
pub const MAGIC: [u8; 8] = *b"heaptap\x02";
/// Offsets in the header of the pairs (address, length) of what else there is: the state, the ring memory, the code (this region
/// and the agent behind it).
pub const STATE_AT: usize = 32;
/// In the length of the state: it is being unmapped. From then on the application may have something of its own there, and
/// it is ours only while it has the magic of one.
pub const LEAVING: u64 = 1 << 63;
/// In the length of the state: it is being mapped. It is ours only if there is a mapping of exactly that place and length.
pub const COMING: u64 = 1 << 62;
/// See [`STATE_AT`].
pub const RINGS_AT: usize = 48;
/// See [`STATE_AT`].
pub const CODE_AT: usize = 64;
/// The [`ABI_VERSION`], a u32.
pub const ABI_AT: usize = 80;
/// The process that it is written into, by the number that its own pid namespace gives it; 0: not told. A forked child has it, too.
pub const TARGET_PID_AT: usize = 88;
/// Addresses of the other regions, up to 8, zero ends.
pub const OTHERS_AT: usize = 104;
/// A name for the ring memory, NUL-terminated: memfd_create(2) reads it from here.
pub const NAME_AT: usize = 176;
const NAME: &[u8] = b"heaptap\0";
/// How the kernel names the ring memory's file.
pub const MEMFD: &str = "memfd:heaptap";
/// How its descriptors are shown in /proc/PID/fd.
pub const RING_FILE: &str = "/memfd:heaptap";
const MAX_OTHERS: usize = 8;
/// `lea r11, [rip+…]`, with which the thunk of a word begins.
const LEA_R11: [u8; 3] = [0x4c, 0x8d, 0x1d];
/// Where the address lies in such a thunk to which it jumps: behind that instruction and `jmp [rip+0]`.
const TARGET_AT: u64 = 7 + 6;
const MAX_PATCHES: usize = 64;

/// What a hook is put on.
#[derive(Debug, Clone)]
pub enum Hooked {
    /// The body of a function: a jump.
    Body(Detour),
    /// A word that points to a function.
    Word {
        /// Address of the word.
        word: RemoteAddr,
        /// What it holds.
        value: RemoteAddr,
    },
}

/// A hook, placed.
#[derive(Debug, Clone)]
pub struct Hook {
    /// What it is put on.
    pub hooked: Hooked,
    /// One of [`crate::agent_abi::function`].
    pub function: u8,
    /// Where it leads.
    pub thunk: RemoteAddr,
    /// How the function runs unhooked: its trampoline, or the function that a word pointed to.
    pub original: RemoteAddr,
    /// The trampoline, of a body.
    pub trampoline: Option<Trampoline>,
    /// What is planted.
    pub patch: Patch,
}

/// A region, ready to be written.
#[derive(Debug, Clone)]
pub struct NearRegion {
    /// Where it is mapped.
    pub base: RemoteAddr,
    /// Its bytes so far.
    pub bytes: Vec<u8>,
    /// Its hooks.
    pub hooks: Vec<Hook>,
}

/// Where the parts that a process has once are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Parts {
    /// The private state and its length in bytes.
    pub state: (RemoteAddr, u64),
    /// The ring memory.
    pub rings: (RemoteAddr, u64),
    /// The first region and the agent behind it.
    pub code: (RemoteAddr, u64),
}

impl NearRegion {
    /// An empty region at `base`.
    pub fn new(base: RemoteAddr, controller: Controller) -> Self {
        let mut region = Self { base, bytes: vec![0; HEADER_LEN + MAX_PATCHES * PATCH_LEN], hooks: vec![] };
        region.bytes[..8].copy_from_slice(&MAGIC);
        region.bytes[8..12].copy_from_slice(&(REGION_LEN as u32).to_le_bytes());
        region.put(16, controller.pid);
        region.put(24, controller.start_time);
        region.put(TARGET_PID_AT, controller.target);
        region.bytes[NAME_AT..NAME_AT + NAME.len()].copy_from_slice(NAME);
        region
    }

    fn put(&mut self, at: usize, value: u64) {
        self.bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }

    fn here(&self) -> RemoteAddr {
        self.base.offset(self.bytes.len() as u64)
    }

    fn align(&mut self, to: usize, fill: u8) {
        while !self.bytes.len().is_multiple_of(to) {
            self.bytes.push(fill);
        }
    }

    /// Adds a hook that leads to `agent`. `function` is of [`crate::agent_abi::function`], `state` the state's address.
    pub fn add(
        &mut self,
        hooked: Hooked,
        function: u8,
        agent: RemoteAddr,
        state: RemoteAddr,
    ) -> Result<(), ProbeError> {
        self.align(16, INT3);
        let trampoline = match &hooked {
            Hooked::Body(detour) => {
                let trampoline = detour.trampoline(self.here())?;
                self.bytes.extend(&trampoline.bytes);
                self.align(16, INT3);
                Some(trampoline)
            }
            Hooked::Word { .. } => None,
        };
        let original = match &hooked {
            Hooked::Body(_) => trampoline.as_ref().map_or(RemoteAddr::NULL, |t| t.at),
            Hooked::Word { value, .. } => *value,
        };
        let descriptor = self.here();
        self.descriptor(Descriptor {
            original: original.0,
            state: state.0,
            function: u32::from(function),
            reserved: 0,
        });
        self.align(16, INT3);
        let thunk = self.here();
        let undo = matches!(&hooked, Hooked::Body(detour) if detour.undo == Some(Undo::Pop));
        self.thunk(undo, descriptor, agent);
        let patch = match &hooked {
            Hooked::Body(detour) => detour.patch(thunk)?,
            Hooked::Word { word, value } => Patch {
                address: *word,
                len: 8,
                before: value.0.to_le_bytes(),
                planted: thunk.0.to_le_bytes(),
            },
        };
        self.hooks.push(Hook { hooked, function, thunk, original, trampoline, patch });
        Ok(())
    }

    fn descriptor(&mut self, descriptor: Descriptor) {
        self.bytes.extend(descriptor.original.to_le_bytes());
        self.bytes.extend(descriptor.state.to_le_bytes());
        self.bytes.extend(descriptor.function.to_le_bytes());
        self.bytes.extend(descriptor.reserved.to_le_bytes());
    }

    /// `[lea rsp, [rsp+8];] lea r11, [rip+descriptor]; jmp [rip+0]; agent`. r11 and the flags are free at a function's entry.
    fn thunk(&mut self, undo_push: bool, descriptor: RemoteAddr, agent: RemoteAddr) {
        if undo_push {
            self.bytes.extend([0x48, 0x8d, 0x64, 0x24, 0x08]);
        }
        let next = self.here().offset(7);
        let displacement = descriptor.0.wrapping_sub(next.0) as i64 as i32;
        self.bytes.extend(LEA_R11);
        self.bytes.extend(displacement.to_le_bytes());
        self.bytes.extend([0xff, 0x25, 0, 0, 0, 0]);
        self.bytes.extend(agent.0.to_le_bytes());
    }

    /// Names the parts that there are.
    pub fn locate(&mut self, parts: &Parts) {
        self.bytes[ABI_AT..ABI_AT + 4].copy_from_slice(&ABI_VERSION.to_le_bytes());
        for (at, (addr, len)) in [(STATE_AT, parts.state), (RINGS_AT, parts.rings), (CODE_AT, parts.code)] {
            self.put(at, addr.0);
            self.put(at + 8, len);
        }
    }

    /// Completes the first region: all patches of the process, and where everything of ours is.
    pub fn finish_first(
        &mut self,
        patches: &[Patch],
        parts: &Parts,
        others: &[RemoteAddr],
    ) -> Result<(), ProbeError> {
        if patches.len() > MAX_PATCHES || others.len() > MAX_OTHERS {
            return Err(ProbeError::Agent { what: "more hooks than a region has room for".into() });
        }
        self.bytes[12..16].copy_from_slice(&(patches.len() as u32).to_le_bytes());
        self.locate(parts);
        for (i, other) in others.iter().enumerate() {
            self.put(OTHERS_AT + 8 * i, other.0);
        }
        for (i, patch) in patches.iter().enumerate() {
            let at = HEADER_LEN + i * PATCH_LEN;
            self.put(at, patch.address.0);
            self.put(at + 8, patch.len as u64);
            self.bytes[at + 16..at + 24].copy_from_slice(&patch.before);
            self.bytes[at + 24..at + 32].copy_from_slice(&patch.planted);
        }
        Ok(())
    }

    /// The bytes to be written, padded with int3.
    pub fn image(&self) -> Result<Vec<u8>, ProbeError> {
        if self.bytes.len() > REGION_LEN {
            let what = format!("thunks of {} bytes do not fit a region", self.bytes.len());
            return Err(ProbeError::Agent { what });
        }
        let mut image = self.bytes.clone();
        image.resize(REGION_LEN, INT3);
        Ok(image)
    }
}

/// The first of the bytes that take a patch back, where `now` holds it. A uprobe that came later has an int3 over the first byte of
/// a jump at an entry: that byte is the kernel's, which has what was there from the file. `None`: the patch is not in.
pub fn first_to_restore(now: &[u8], planted: &[u8]) -> Option<usize> {
    match (now, planted) {
        _ if now == planted => Some(0),
        ([INT3, now @ ..], [_, planted @ ..]) if planted.len() < 7 && now == planted => Some(1),
        _ => None,
    }
}

/// What makes a word's thunk pass calls on by itself, as the agent goes and the application may keep the thunk's address: the
/// address that it jumps to, and where that lies. Data alone changes: a thread that stands between the thunk's two instructions, or
/// will come back to there from a signal handler, finds the second one whole. (It has the descriptor's address in r11, which
/// is free at a function's entry.)
pub fn pass_on(thunk: RemoteAddr, original: RemoteAddr) -> (RemoteAddr, [u8; 8]) {
    (thunk.offset(TARGET_AT), original.0.to_le_bytes())
}

/// Whether these first bytes are those of a word's thunk as [`NearRegion::add`] makes it.
pub fn is_thunk(head: &[u8]) -> bool {
    head.starts_with(&LEA_R11)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent_abi::function;

    #[test]
    fn a_thunk_passes_on_by_a_change_of_data_alone() {
        let base = RemoteAddr(0x1_0000);
        let mut region = NearRegion::new(base, Controller::default());
        let hooked = Hooked::Word { word: RemoteAddr(0x5000), value: RemoteAddr(0x7777_0000) };
        let (agent, state) = (RemoteAddr(0x1234_5678_9abc), RemoteAddr(0x9000));
        region.add(hooked, function::PYTHON, agent, state).unwrap();
        let thunk = region.hooks[0].thunk;
        let (at, bytes) = pass_on(thunk, RemoteAddr(0x7777_0000));
        let [from, to] = [thunk, at].map(|addr| addr.since(base) as usize);
        assert!(is_thunk(&region.bytes[from..]));
        assert_eq!(region.bytes[to..to + 8], agent.0.to_le_bytes());
        // What jumps by it is right before it: ff 25 and a distance of 0.
        assert_eq!(region.bytes[to - 6..to], [0xff, 0x25, 0, 0, 0, 0]);
        assert_eq!(bytes, 0x7777_0000_u64.to_le_bytes());
        assert_eq!(to + 8, region.bytes.len());
    }
}
