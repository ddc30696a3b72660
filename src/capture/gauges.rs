//! [`Gauges`]: what the kernel and the allocators say of the target at one moment, beside what was recorded.
//!
//! A chunk of gauges holds some seconds of them in columns. Every gauge may be unknown: not every kernel, libc or Python
//! tells all of them.

use super::varint::{Cursor, put, unzigzag, zigzag};

macro_rules! gauges {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {
        /// Gauges of one moment. Bytes where nothing else is said.
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
        pub struct Gauges {
            /// Since the start of recording, in nanoseconds.
            pub time_ns: u64,
            $($(#[$doc])* pub $name: Option<u64>,)+
        }

        impl Gauges {
            /// Their names, in the order of the file. New ones are appended.
            pub const NAMES: &'static [&'static str] = &[$(stringify!($name)),+];

            /// The values in the order of [`NAMES`](Self::NAMES).
            pub fn values(&self) -> Vec<Option<u64>> {
                vec![$(self.$name),+]
            }

            /// The inverse of [`values`](Self::values); missing ones are unknown, more are ignored.
            pub fn from_values(time_ns: u64, values: &[Option<u64>]) -> Self {
                let mut values = values.iter().copied();
                Self { time_ns, $($name: values.next().flatten()),+ }
            }
        }
    };
}
gauges! {
    /// The resident set.
    resident,
    /// The resident set, shared pages divided among those who share them.
    proportional,
    /// Anonymous memory that is resident.
    anonymous,
    /// What is swapped out.
    swap,
    /// Live by our account (an estimate where samples are recorded).
    live,
    /// What the C library's heap has handed out.
    heap_in_use,
    /// What it holds beside that: freed by the program, not given back to the kernel.
    heap_free,
    /// pymalloc's arenas.
    arenas,
    /// What of them is in blocks that are in use.
    arenas_in_use,
    /// Threads (a number).
    threads,
    /// Open descriptors (a number).
    descriptors,
    /// Collections of the youngest generation so far (a number).
    collections_0,
    /// Of the middle generation.
    collections_1,
    /// Of the oldest.
    collections_2,
    /// The least memory limit of its cgroups.
    limit,
    /// What the cgroup with that limit uses, without what the kernel can drop at once.
    limit_used,
    /// What the C library's heap has from the kernel: what it handed out and what it holds.
    heap_held,
    /// What of pymalloc's arenas is in pools that hold a block.
    pools,
}

/// The content of a chunk with these.
pub(super) fn encode(gauges: &[Gauges]) -> Vec<u8> {
    let mut buf = Vec::new();
    put(&mut buf, gauges.len() as u64);
    put(&mut buf, Gauges::NAMES.len() as u64);
    let mut last = 0;
    for moment in gauges {
        put(&mut buf, moment.time_ns.saturating_sub(last));
        last = moment.time_ns;
    }
    for at in 0..Gauges::NAMES.len() {
        let mut last = 0;
        for moment in gauges {
            // 0 is unknown; else the difference to the last known one, and one more.
            let value = moment.values()[at];
            put(&mut buf, value.map_or(0, |v| zigzag(v.wrapping_sub(last) as i64).saturating_add(1)));
            last = value.unwrap_or(last);
        }
    }
    buf
}

/// The gauges of a chunk. An error says what is wrong with it.
pub(super) fn decode(raw: &[u8]) -> Result<Vec<Gauges>, &'static str> {
    const ENDED: &str = "a chunk of gauges ends too early";
    let mut cursor = Cursor::new(raw, 0);
    let (count, names) = (cursor.varint().ok_or(ENDED)?, cursor.varint().ok_or(ENDED)?);
    // Each takes a byte at least: nothing is reserved that the chunk does not hold.
    if count.checked_mul(names.saturating_add(1)).is_none_or(|bytes| bytes > raw.len() as u64) {
        return Err("a chunk of gauges has impossible numbers");
    }
    let (count, names) = (count as usize, names as usize);
    let (mut times, mut time) = (Vec::with_capacity(count), 0_u64);
    for _ in 0..count {
        time = time.saturating_add(cursor.varint().ok_or(ENDED)?);
        times.push(time);
    }
    let kept = names.min(Gauges::NAMES.len());
    let mut values = vec![None; count * kept];
    for at in 0..names {
        let mut last = 0_u64;
        for moment in 0..count {
            let number = cursor.varint().ok_or(ENDED)?;
            if number > 0 {
                last = last.wrapping_add(unzigzag(number - 1) as u64);
            }
            if at < kept && number > 0 {
                values[moment * kept + at] = Some(last);
            }
        }
    }
    let moment =
        |(i, time_ns): (usize, &u64)| Gauges::from_values(*time_ns, &values[i * kept..(i + 1) * kept]);
    Ok(times.iter().enumerate().map(moment).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn gauges_go_there_and_back(
            steps in prop::collection::vec((0u64..1 << 50, prop::collection::vec(prop::option::of(0u64..1 << 62), Gauges::NAMES.len())), 0..20)
        ) {
            let mut time = 0;
            let gauges: Vec<Gauges> = steps.iter().map(|(step, values)| {
                time += step;
                Gauges::from_values(time, values)
            }).collect();
            prop_assert_eq!(decode(&encode(&gauges)), Ok(gauges));
        }

        #[test]
        fn any_bytes_are_survived(raw in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode(&raw);
        }
    }

    #[test]
    fn a_later_version_may_have_more_of_them() {
        // One moment at 7 ns, 20 gauges, the last of which nobody knows here.
        let mut raw = vec![1, 20, 7];
        raw.extend([3; 20]);
        let gauges = decode(&raw).unwrap();
        assert_eq!((gauges.len(), gauges[0].time_ns, gauges[0].resident), (1, 7, Some(1)));
    }
}
