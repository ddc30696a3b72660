//! The agent's end of the rings, for tests: writes records through the file behind the ring memory, as the agent does through
//! its mapping.

use heaptap::agent_abi::{
    RING_CONTROLS_AT, RingControl, SharedControl, function, record, ring_data_at, ring_memory_len, stripe,
};
use heaptap::probe::ring::Rings;
use std::fs::File;
use std::mem::offset_of;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

/// Ring memory in a file, and where each writer is.
pub struct RingFile {
    file: File,
    pub ring_count: usize,
    pub ring_len: usize,
}

impl RingFile {
    pub fn new(ring_count: usize, ring_len: usize) -> Self {
        let file = tempfile::tempfile().unwrap();
        file.set_len(ring_memory_len(ring_count, ring_len) as u64).unwrap();
        Self { file, ring_count, ring_len }
    }

    /// The controller's end.
    pub fn rings(&self) -> Rings {
        Rings::map(&self.fd(), self.ring_count, self.ring_len).unwrap()
    }

    /// When the controller was last heard of.
    pub fn heartbeat(&self) -> u64 {
        let mut bytes = [0; 8];
        self.file.read_exact_at(&mut bytes, offset_of!(SharedControl, heartbeat) as u64).unwrap();
        u64::from_le_bytes(bytes)
    }

    pub fn fd(&self) -> OwnedFd {
        self.file.try_clone().unwrap().into()
    }

    pub fn writer(&self, ring: usize) -> Writer {
        let file = self.file.try_clone().unwrap();
        let data = ring_data_at(self.ring_count, self.ring_len, ring) as u64;
        let control = (RING_CONTROLS_AT + ring * size_of::<RingControl>()) as u64;
        Writer { file, data, control, len: self.ring_len as u64, end: 0, tail: 0 }
    }
}

/// The writer of one ring. What it writes exists once it is published.
pub struct Writer {
    file: File,
    data: u64,
    control: u64,
    len: u64,
    /// End of what is written.
    pub end: u64,
    tail: u64,
}

impl Writer {
    /// Whether there is room for so many words.
    pub fn has_room(&mut self, words: usize) -> bool {
        let (pad, need) = (self.pad(words), words as u64 * 8);
        if self.end + pad + need - self.tail > self.len {
            self.tail = self.word(offset_of!(RingControl, tail));
        }
        self.end + pad + need - self.tail <= self.len
    }

    /// Writes a record, for which there is room.
    pub fn write(&mut self, words: &[u64]) {
        assert!(self.has_room(words.len()), "the ring is full");
        let pad = self.pad(words.len());
        if pad > 0 {
            self.put(self.data + self.end % self.len, &[u64::from(record::PAD)]);
        }
        self.end += pad;
        self.put(self.data + self.end % self.len, words);
        self.end += words.len() as u64 * 8;
    }

    /// Records do not wrap around the end.
    fn pad(&self, words: usize) -> u64 {
        let at = self.end % self.len;
        if at + words as u64 * 8 > self.len { self.len - at } else { 0 }
    }

    /// Makes everything up to `end` exist.
    pub fn publish(&self, end: u64) {
        self.put(self.control + offset_of!(RingControl, head) as u64, &[end]);
    }

    #[allow(dead_code)]
    pub fn count_drop(&self, dropped: u64) {
        self.put(self.control + offset_of!(RingControl, dropped) as u64, &[dropped]);
    }

    fn word(&self, field: usize) -> u64 {
        let mut bytes = [0; 8];
        self.file.read_exact_at(&mut bytes, self.control + field as u64).unwrap();
        u64::from_le_bytes(bytes)
    }

    fn put(&self, at: u64, words: &[u64]) {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.file.write_all_at(&bytes, at).unwrap();
    }
}

/// First word of a record.
pub fn head(kind: u8, function: u8, number: u32) -> u64 {
    u64::from(number) << 32 | u64::from(function) << 8 | u64::from(kind)
}

/// The numbers of the stripes, as the agent takes them.
pub struct Numbers(Vec<std::sync::atomic::AtomicU32>);

impl Default for Numbers {
    fn default() -> Self {
        Self((0..heaptap::agent_abi::STRIPES).map(|_| 0.into()).collect())
    }
}

impl Numbers {
    pub fn take(&self, which: u8, address: u64) -> u32 {
        let mapping = matches!(which, function::MMAP | function::MUNMAP | function::MREMAP);
        let stripe = if mapping { heaptap::agent_abi::MAPPING_STRIPE } else { stripe(address) };
        self.0[stripe].fetch_add(1, std::sync::atomic::Ordering::SeqCst)
    }
}
