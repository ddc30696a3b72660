//! Records to bytes, for one chunk at a time (the bytes are drawn in `format`).
//!
//! Pure: no file, no tables. What is remembered between records is what the decoder (`v3`) can
//! know too, and it is forgotten at a chunk's start.

use super::finder::Finder;
use super::format::{TIME_UNIT_NS, control, place};
use super::native::{ModuleId, NativeFrame};
use super::predict::{Expected, Place, Predictor, Shape, class};
use super::record::{
    Allocation, DropReason, FrameId, Free, FreeUnknown, GapReason, StackId, StringId, Unmap,
};
use super::varint::{put, zigzag};

pub(super) struct ChunkEncoder {
    control: Vec<u8>,
    stacks: Vec<u8>,
    sizes: Vec<u8>,
    addresses: Vec<u8>,
    /// Events as expected that no byte of `control` tells yet.
    run: u8,
    predictor: Predictor,
    /// Where addresses of allocations were last, and of blocks given back.
    allocated: Finder,
    given_back: Finder,
    tid: Option<u32>,
    interval: u64,
    /// In units of the format.
    time: u64,
    next_string: u32,
    next_frame: u32,
    next_node: u32,
    next_module: u32,
}

impl ChunkEncoder {
    pub(super) fn new() -> Self {
        Self {
            control: Vec::new(),
            stacks: Vec::new(),
            sizes: Vec::new(),
            addresses: Vec::new(),
            run: 0,
            predictor: Predictor::new(),
            allocated: Finder::new(),
            given_back: Finder::new(),
            tid: None,
            interval: 0,
            time: 0,
            next_string: 0,
            next_frame: 0,
            next_node: 0,
            next_module: 0,
        }
    }

    /// Appends the content of the chunk to `out`, and starts the next chunk.
    pub(super) fn finish(&mut self, out: &mut Vec<u8>) {
        self.end_run();
        for column in [&self.stacks, &self.sizes, &self.addresses] {
            put(out, column.len() as u64);
        }
        for column in [&mut self.stacks, &mut self.sizes, &mut self.addresses, &mut self.control] {
            out.append(column);
        }
        self.predictor.reset();
        self.tid = None;
        (self.interval, self.time) = (0, 0);
        (self.next_string, self.next_frame, self.next_node, self.next_module) = (0, 0, 0, 0);
    }

    /// Bytes of the chunk so far, but for its first few.
    pub(super) fn len(&self) -> usize {
        self.control.len() + self.stacks.len() + self.sizes.len() + self.addresses.len() + 1
    }

    /// Events of the chunk so far.
    pub(super) fn events(&self) -> u32 {
        self.predictor.count()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.control.is_empty() && self.run == 0
    }

    pub(super) fn string(&mut self, id: StringId, text: &str) {
        self.begin(control::STRING);
        self.next_string = self.id(id.0, self.next_string);
        self.text(text);
    }

    pub(super) fn frame(&mut self, id: FrameId, function: StringId, file: StringId, line: u32) {
        self.begin(control::FRAME);
        self.next_frame = self.id(id.0, self.next_frame);
        for field in [function.0, file.0, line] {
            put(&mut self.control, u64::from(field));
        }
    }

    pub(super) fn node(&mut self, id: StackId, parent: StackId, frame: FrameId) {
        self.begin(control::STACK);
        self.next_node = self.id(id.0, self.next_node);
        put(&mut self.control, u64::from(parent.0));
        put(&mut self.control, u64::from(frame.0));
    }

    pub(super) fn module(&mut self, id: ModuleId, path: &str, build_id: &[u8]) {
        self.begin(control::MODULE);
        self.next_module = self.id(id.0, self.next_module);
        self.text(path);
        put(&mut self.control, build_id.len() as u64);
        self.control.extend_from_slice(build_id);
    }

    pub(super) fn native_frame(&mut self, id: FrameId, frame: NativeFrame) {
        self.begin(control::NATIVE_FRAME);
        self.next_frame = self.id(id.0, self.next_frame);
        put(&mut self.control, frame.module.map_or(0, |module| u64::from(module.0) + 1));
        put(&mut self.control, frame.address);
        self.control.push(frame.flags());
    }

    pub(super) fn thread(&mut self, tid: u32, os_name: &str, python_name: &str) {
        self.begin(control::THREAD);
        put(&mut self.control, u64::from(tid));
        self.text(os_name);
        self.text(python_name);
    }

    pub(super) fn time(&mut self, ns: u64) {
        let time = (ns / TIME_UNIT_NS).max(self.time);
        self.begin(control::TIME);
        put(&mut self.control, time - self.time);
        self.time = time;
    }

    pub(super) fn allocation(&mut self, event: &Allocation) {
        self.switch(event.tid);
        // Ranged ones are recorded for certain whatever the interval: nothing to say.
        if event.interval != self.interval && !event.allocator.is_ranged() {
            self.begin(control::INTERVAL);
            put(&mut self.control, event.interval);
            self.interval = event.interval;
        }
        let (stack, size) = (event.stack, event.size);
        self.event(
            Shape { stack, size, ..Shape::of(class::ALLOCATION, event.allocator.id()) },
            event.address.0,
        );
    }

    pub(super) fn free(&mut self, event: &Free) {
        self.switch(event.tid);
        self.event(Shape::of(class::FREE, event.deallocator.id()), event.address.0);
    }

    pub(super) fn free_unknown(&mut self, event: &FreeUnknown) {
        self.switch(event.tid);
        self.event(Shape::of(class::FREE_UNKNOWN, event.deallocator.id()), event.address.0);
    }

    pub(super) fn unmap(&mut self, event: &Unmap) {
        self.switch(event.tid);
        self.event(Shape { size: event.len, ..Shape::of(class::UNMAP, 0) }, event.address.0);
    }

    pub(super) fn dropped(&mut self, count: u64, reason: DropReason) {
        self.begin(control::DROP);
        put(&mut self.control, count);
        self.control.push(reason.id());
    }

    pub(super) fn gap(&mut self, duration_ns: u64, reason: GapReason) {
        self.begin(control::GAP);
        put(&mut self.control, duration_ns);
        self.control.push(reason.id());
    }

    /// An event: as little of it as was not expected.
    fn event(&mut self, shape: Shape, address: u64) {
        let expected = self.predictor.expected();
        let as_expected = shape == expected.shape;
        let there =
            expected.place.filter(|place| self.predictor.address(shape.class(), *place) == Some(address));
        match (as_expected, there) {
            (true, Some(_)) => {
                self.run += 1;
                if self.run == control::LONGEST_RUN {
                    self.end_run();
                }
            }
            (true, None) => self.begin(control::EXPECTED_ELSEWHERE),
            (false, _) => self.shape(shape, &expected),
        }
        let place = match there {
            Some(_) => {
                if !as_expected {
                    self.addresses.push(place::EXPECTED as u8);
                }
                there
            }
            None => self.place(shape.class(), address),
        };
        let number = self.predictor.number(shape.class());
        let finder =
            if shape.class() == class::ALLOCATION { &mut self.allocated } else { &mut self.given_back };
        finder.put(address, number);
        self.predictor.tell(shape, address, place, as_expected);
    }

    fn shape(&mut self, shape: Shape, expected: &Expected) {
        let kind = shape.kind();
        match shape.class() {
            class::ALLOCATION => {
                let (same_stack, same_size) =
                    (shape.stack == expected.shape.stack, shape.size == expected.shape.size);
                let stack_bit = if same_stack { control::EXPECTED_STACK } else { 0 };
                let size_bit = if same_size { control::EXPECTED_SIZE } else { 0 };
                self.begin(control::ALLOCATION | stack_bit | size_bit | kind);
                if !same_stack {
                    put(&mut self.stacks, u64::from(shape.stack.0));
                }
                if !same_size {
                    put(&mut self.sizes, shape.size);
                }
            }
            class::FREE => self.begin(control::FREE | kind),
            class::FREE_UNKNOWN => self.begin(control::FREE_UNKNOWN | kind),
            _ => {
                self.begin(control::UNMAP);
                put(&mut self.sizes, shape.size);
            }
        }
    }

    /// Tells an address that was not expected.
    fn place(&mut self, class: u8, address: u64) -> Option<Place> {
        let finder = if class == class::ALLOCATION { &self.given_back } else { &self.allocated };
        let back = self.predictor.others(class).wrapping_sub(finder.find(address)).wrapping_sub(1);
        let delta = address.wrapping_sub(self.predictor.last_address()) as i64;
        let place = if self.predictor.address(class, Place::Back(back)) == Some(address) {
            Place::Back(back)
        } else if delta & 15 == 0 {
            Place::Units(delta >> 4)
        } else {
            self.addresses.push(place::BYTES as u8);
            put(&mut self.addresses, zigzag(delta));
            return None;
        };
        put(&mut self.addresses, place.number());
        Some(place)
    }

    fn switch(&mut self, tid: u32) {
        if self.tid != Some(tid) {
            self.begin(control::SWITCH);
            put(&mut self.control, zigzag(i64::from(tid) - i64::from(self.tid.unwrap_or(0))));
            self.tid = Some(tid);
        }
    }

    /// Begins any record but an event as expected.
    fn begin(&mut self, first: u8) {
        self.end_run();
        self.control.push(first);
    }

    fn end_run(&mut self) {
        if self.run > 0 {
            self.control.push(self.run - 1);
            self.run = 0;
        }
    }

    /// Writes an id; gives the one expected next.
    fn id(&mut self, id: u32, expected: u32) -> u32 {
        put(&mut self.control, zigzag(i64::from(id) - i64::from(expected)));
        id.wrapping_add(1)
    }

    fn text(&mut self, text: &str) {
        put(&mut self.control, text.len() as u64);
        self.control.extend_from_slice(text.as_bytes());
    }
}
